"""Every Triton kernel compiles for every architecture without spilling: `python -m bench.aot`, in a process without the interpreter."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_compile_for_every_architecture_without_spills(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    table = tmp_path / "aot.json"
    run = subprocess.run(
        [sys.executable, "-m", "bench.aot", "--json", str(table)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    rows = json.loads(table.read_text())
    assert {row["sm"] for row in rows} == {80, 90, 100, 120}
    assert all(row["spills"] == 0 and 0 < row["registers"] <= 255 for row in rows)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_every_triton_kernel_is_in_the_table():
    """A kernel added to rows_triton.py without a line in bench/aot.py fails here."""
    from fastalign_kernels import rows_triton

    kernels = {name for name in vars(rows_triton) if name.endswith("_kernel")}
    source = (ROOT / "bench" / "aot.py").read_text()
    assert kernels and all(f'"{name}"' in source for name in kernels)
