"""Cross-entropy under a LoRA adapter of rank 16 on a frozen head, beside forming W + s B A."""

import pytest

from ..core.shapes import DTYPE
from ..methods.ceilings import TWO_GEMMS
from ..methods.lora import FORMED
from .case import Case, Target, grid

CASES = {
    f"linear_cross_entropy {DTYPE}, LoRA": Case(
        "linear_cross_entropy with LoRA",
        DTYPE,
        ("hidden", "A", "B"),
        TWO_GEMMS,
        (Target("time", 0.8, FORMED), Target("error", 2, "PyTorch")),
        memory=True,
    )
}


@pytest.mark.parametrize(("case", "row"), grid(CASES))
def bench_linear_lora(case, row, record):
    record(case, row)
