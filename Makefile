# Two commands for a fresh machine: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/.installed
EXTRAS ?= dev
# With several threads on a small shared machine torch was measured 3-8 times slower than with one.
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo test lint bench clean
setup: $(SETUP)

# torch first and by version, so that no dependency's range pulls another build of it.
$(SETUP): pyproject.toml setup.py requirements.lock $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c requirements.lock torch==2.13.0 $(if $(filter Linux,$(shell uname -s)),triton==3.7.1) setuptools wheel
	$(BIN)/pip install --quiet -c requirements.lock --no-build-isolation -e '.[$(EXTRAS)]'
	touch $@

demo: $(SETUP)
	$(BIN)/fastalign demo

test: $(SETUP)
	$(BIN)/python -m pytest

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(SETUP)
	$(BIN)/pip install --quiet -c requirements.lock --no-build-isolation -e '.[bench]'
	$(BIN)/python -m bench

clean:
	rm -rf .venv build *.egg-info runs kernels/fastalign_kernels/_native.so
