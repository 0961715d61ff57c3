"""KTO of 4 rows from hidden states, the reference's pass and the gradients of hidden states and weight
included."""

import pytest

from ..core.shapes import DTYPE, HALF
from ..methods.ceilings import bare_gemms
from ..methods.preference import LIGER_KTO
from .case import Case, Target, grid

OPERATION = "linear_kto"
FOUR = {  # one of the reference, three of the policy
    "4 bare GEMMs": bare_gemms(2, hidden_grad=True, weight_grad=True),
    "4 bare GEMMs, gemm.py": bare_gemms(2, hidden_grad=True, weight_grad=True, ours=True),
}
TARGETS = (
    Target("time", 1, "PyTorch"),
    Target("time", 0.55, LIGER_KTO),
    Target("memory", 128),
    Target("growth", 1.2),
)

CASES = {
    f"linear_kto {DTYPE}": Case(
        OPERATION, DTYPE, ("hidden", "weight"), FOUR, TARGETS, HALF, memory=True, longer=8
    )
}


@pytest.mark.parametrize(("case", "row"), grid(CASES))
def bench_linear_kto(case, row, record):
    record(case, row)
