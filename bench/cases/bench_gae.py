"""Generalised advantage estimation of 64 padded sequences of 1024 tokens, against the loop over time."""

import pytest

from ..methods.ceilings import COPIES
from .case import Case, Shape, Target, grid

OPERATION = "gae"
CASES = {
    "gae fp32": Case(
        OPERATION,
        "fp32",
        (),
        COPIES,
        (Target("time", 0.02, "PyTorch"), Target("error", 2, "PyTorch")),
        shape=Shape(64, 0, 1024),
    ),
}


@pytest.mark.parametrize(("case", "row"), grid(CASES))
def bench_gae(case, row, record):
    record(case, row)
