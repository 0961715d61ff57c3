"""Whitening of the advantages of 64 padded sequences of 1024 tokens, against TRL's formula."""

import pytest

from ..methods.ceilings import COPIES
from .case import Case, Shape, Target, grid

OPERATION = "whiten"
TARGETS = (Target("time", 0.5, "PyTorch"), Target("error", 2, "PyTorch"))
CASES = {"masked_whiten fp32": Case(OPERATION, "fp32", (), COPIES, TARGETS, shape=Shape(64, 0, 1024))}


@pytest.mark.parametrize(("case", "row"), grid(CASES))
def bench_whiten(case, row, record):
    record(case, row)
