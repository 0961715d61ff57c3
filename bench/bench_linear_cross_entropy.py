"""Cross-entropy from hidden states: trained, below a frozen head as in LoRA runs, and without gradients."""

import pytest

from .methods import bare_gemms
from .suite import Case, Target, grid

OPERATION = "linear_cross_entropy"
THREE = {
    "3 bare GEMMs": bare_gemms(1, hidden_grad=True, weight_grad=True),
    "3 bare GEMMs, preallocated": bare_gemms(1, hidden_grad=True, weight_grad=True, preallocated=True),
}
TWO = {
    "2 bare GEMMs": bare_gemms(1, hidden_grad=True),
    "2 bare GEMMs, preallocated": bare_gemms(1, hidden_grad=True, preallocated=True),
}
ONE = {"1 bare GEMM": bare_gemms(1), "1 bare GEMM, preallocated": bare_gemms(1, preallocated=True)}

CASES = {
    "linear_cross_entropy fp32": Case(
        OPERATION,
        "fp32",
        ("hidden", "weight"),
        THREE,
        (Target("time", 1.1, "3 bare GEMMs"), Target("memory", 96), Target("error", 2, "PyTorch")),
        memory=True,
    ),
    "linear_cross_entropy bf16": Case(
        OPERATION,
        "bf16",
        ("hidden", "weight"),
        THREE,
        (Target("time", 1, "PyTorch"), Target("error", 1, "PyTorch")),
        memory=True,
    ),
    "linear_cross_entropy fp32, frozen head": Case(
        OPERATION, "fp32", ("hidden",), TWO, (Target("time", 1.1, "2 bare GEMMs"), Target("error", 2, "PyTorch"))
    ),
    "linear_cross_entropy fp32, no gradients": Case(OPERATION, "fp32", (), ONE, (Target("time", 1.1, "1 bare GEMM"),)),
}


@pytest.mark.parametrize(("case", "row"), grid(CASES))
def bench_linear_cross_entropy(case, row, record):
    record(case, row)
