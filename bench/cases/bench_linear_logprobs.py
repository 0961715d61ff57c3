"""Log-probabilities of given ids from hidden states, for any upstream gradient, as DPO, KTO and PPO need
them."""

import pytest

from ..core.shapes import DTYPE, HALF
from ..methods.ceilings import bare_gemms
from .case import Case, Target, grid

OPERATION = "linear_logprobs"
FOUR = {
    "4 bare GEMMs": bare_gemms(2, hidden_grad=True, weight_grad=True),
    "4 bare GEMMs, gemm.py": bare_gemms(2, hidden_grad=True, weight_grad=True, ours=True),
}
TWO = {
    "2 bare GEMMs": bare_gemms(1, hidden_grad=True),
    "2 bare GEMMs, gemm.py": bare_gemms(1, hidden_grad=True, ours=True),
}
ONE = {"1 bare GEMM": bare_gemms(1), "1 bare GEMM, gemm.py": bare_gemms(1, ours=True)}

CASES = {
    f"linear_logprobs {DTYPE}": Case(
        OPERATION, DTYPE, ("hidden", "weight"), FOUR, (Target("error", 2, "PyTorch"),), memory=True
    ),
    f"linear_logprobs {DTYPE}, frozen head": Case(
        OPERATION,
        DTYPE,
        ("hidden",),
        TWO,
        (Target("time", 1.1, "2 bare GEMMs"), Target("error", 2, "PyTorch")),
        HALF,
    ),
    f"linear_logprobs {DTYPE}, no gradients": Case(
        OPERATION, DTYPE, (), ONE, (Target("time", 1.1, "1 bare GEMM"),), HALF
    ),
}


@pytest.mark.parametrize(("case", "row"), grid(CASES))
def bench_linear_logprobs(case, row, record):
    record(case, row)
