"""The reward model's loss of 4096 pairs of scores and its gradients."""

import pytest

from ..core.operation import Shape
from ..methods.ceilings import read_write
from .case import Case, Target, grid

CEILING = {"one read and write of both (clone)": read_write}
CASES = {
    "reward fp32": Case(
        "reward", "fp32", ("chosen", "rejected"), CEILING, (Target("error", 2, "PyTorch"),), Shape(4096, 0, 0)
    )
}


@pytest.mark.parametrize(("case", "row"), grid(CASES))
def bench_reward(case, row, record):
    record(case, row)
