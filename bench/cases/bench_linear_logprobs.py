"""Log-probabilities of given ids from hidden states, for any upstream gradient, as DPO, KTO and PPO need
them."""

import pytest

from ..core.shapes import DTYPE, HALF
from ..methods.ceilings import FOUR_GEMMS, ONE_GEMM, TWO_GEMMS
from .case import Case, Target, grid

OPERATION = "linear_logprobs"

CASES = {
    f"linear_logprobs {DTYPE}": Case(
        OPERATION, DTYPE, ("hidden", "weight"), FOUR_GEMMS, (Target("error", 2, "PyTorch"),), memory=True
    ),
    f"linear_logprobs {DTYPE}, frozen head": Case(
        OPERATION,
        DTYPE,
        ("hidden",),
        TWO_GEMMS,
        (Target("time", 1.1, "2 bare GEMMs"), Target("error", 2, "PyTorch")),
        shape=HALF,
    ),
    f"linear_logprobs {DTYPE}, no gradients": Case(
        OPERATION, DTYPE, (), ONE_GEMM, (Target("time", 1.1, "1 bare GEMM"),), shape=HALF
    ),
}


@pytest.mark.parametrize(("case", "row"), grid(CASES))
def bench_linear_logprobs(case, row, record):
    record(case, row)
