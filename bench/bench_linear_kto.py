"""KTO of 4 rows from hidden states, the reference's pass included, and its gradients of hidden states and weight: 512 tokens a row."""

import pytest

from .methods import bare_gemms
from .preference_methods import LIGER_KTO
from .suite import Case, Target, grid

OPERATION = "linear_kto"
FOUR = {  # one of the reference, three of the policy
    "4 bare GEMMs": bare_gemms(2, hidden_grad=True, weight_grad=True),
    "4 bare GEMMs, preallocated": bare_gemms(2, hidden_grad=True, weight_grad=True, preallocated=True),
}
TARGETS = (Target("time", 1, "PyTorch"), Target("time", 0.55, LIGER_KTO), Target("memory", 128), Target("growth", 1.2))

CASES = {"linear_kto fp32": Case(OPERATION, "fp32", ("hidden", "weight"), FOUR, TARGETS, memory=True, longer=8)}


@pytest.mark.parametrize(("case", "row"), grid(CASES))
def bench_linear_kto(case, row, record):
    record(case, row)
