"""Cross-entropy, and its gradient, of logits that exist already."""

import pytest

from ..methods.ceilings import read_read_write
from .case import Case, Target, grid

OPERATION = "cross_entropy"
CEILING = {"two reads, one write (amax, clone)": read_read_write}

CASES = {
    "cross_entropy fp32": Case(
        OPERATION, "fp32", ("logits",), CEILING, (Target("error", 2, "PyTorch"),), memory=True
    ),
    "cross_entropy bf16": Case(OPERATION, "bf16", ("logits",), CEILING, (Target("error", 2, "PyTorch"),)),
}


@pytest.mark.parametrize(("case", "row"), grid(CASES))
def bench_cross_entropy(case, row, record):
    record(case, row)
