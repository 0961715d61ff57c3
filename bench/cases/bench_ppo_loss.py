"""PPO's policy loss with an entropy bonus and all its metrics, from log-probabilities: [64, 1024] tokens,
forward and backward."""

import pytest

from ..methods.ceilings import COPIES
from .case import Case, Shape, Target, grid

OPERATION = "ppo"
CASES = {
    "ppo_loss fp32": Case(
        OPERATION, "fp32", ("logp", "entropy"), COPIES, (Target("time", 0.25, "PyTorch"),), Shape(64, 0, 1024)
    ),
}


@pytest.mark.parametrize(("case", "row"), grid(CASES))
def bench_ppo_loss(case, row, record):
    record(case, row)
