"""Top-K distillation from hidden states, K = 64, beside the plain formula."""

import pytest

from ..core.shapes import DTYPE
from ..methods.ceilings import THREE_GEMMS
from .case import Case, Target, grid

CASES = {
    f"linear_distillation {DTYPE}": Case(
        "linear_distillation",
        DTYPE,
        ("hidden", "weight"),
        THREE_GEMMS,
        (Target("time", 1, "PyTorch"), Target("error", 2, "PyTorch")),
        memory=True,
    )
}


@pytest.mark.parametrize(("case", "row"), grid(CASES))
def bench_linear_distillation(case, row, record):
    record(case, row)
