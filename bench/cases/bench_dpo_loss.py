"""dpo_loss of 4096 pairs of log-probabilities and its gradients: a case for each loss_type of the table."""

import pytest

from ..core.operation import Shape
from ..methods.ceilings import COPIES
from ..methods.pairs import PAIRS
from .case import Case, Target, grid

TRAINED = ("policy_chosen", "policy_rejected")
CASES = {
    f"{operation} fp32": Case(
        operation, "fp32", TRAINED, COPIES, (Target("error", 2, "PyTorch"),), Shape(4096, 0, 0)
    )
    for operation in PAIRS
}


@pytest.mark.parametrize(("case", "row"), grid(CASES))
def bench_dpo_loss(case, row, record):
    record(case, row)
