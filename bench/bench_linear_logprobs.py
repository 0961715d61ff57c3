"""Log-probabilities of given ids from hidden states, for any upstream gradient, as DPO, KTO and PPO need them."""

import pytest

from .methods import bare_gemms
from .suite import Case, Target, grid

OPERATION = "linear_logprobs"
FOUR = {
    "4 bare GEMMs": bare_gemms(2, hidden_grad=True, weight_grad=True),
    "4 bare GEMMs, preallocated": bare_gemms(2, hidden_grad=True, weight_grad=True, preallocated=True),
}
TWO = {
    "2 bare GEMMs": bare_gemms(1, hidden_grad=True),
    "2 bare GEMMs, preallocated": bare_gemms(1, hidden_grad=True, preallocated=True),
}

CASES = {
    "linear_logprobs fp32": Case(OPERATION, "fp32", ("hidden", "weight"), FOUR, (Target("error", 2, "PyTorch"),), memory=True),
    "linear_logprobs fp32, frozen head": Case(
        OPERATION, "fp32", ("hidden",), TWO, (Target("time", 1.1, "2 bare GEMMs"), Target("error", 2, "PyTorch"))
    ),
}


@pytest.mark.parametrize(("case", "row"), grid(CASES))
def bench_linear_logprobs(case, row, record):
    record(case, row)
