"""DPO of 2 pairs and KTO of 4 rows from hidden states, with the reference's pass and the gradients of hidden
states and weight."""

import pytest

from ..core.shapes import DTYPE, HALF
from ..methods.ceilings import FOUR_GEMMS
from ..methods.preference import LIGER_DPO, LIGER_KTO
from .case import Case, Target, grid

CASES = {
    f"{operation} {DTYPE}": Case(
        operation,
        DTYPE,
        ("hidden", "weight"),
        FOUR_GEMMS,
        (
            Target("time", 1, "PyTorch"),
            Target("time", 0.55, liger),
            Target("memory", 128),
            Target("growth", 1.2),
        ),
        shape=HALF,
        memory=True,
        longer=8,
    )
    for operation, liger in (("linear_dpo", LIGER_DPO), ("linear_kto", LIGER_KTO))
}


@pytest.mark.parametrize(("case", "row"), grid(CASES))
def bench_linear_preference(case, row, record):
    record(case, row)
