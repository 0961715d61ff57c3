"""A minibatch of PPO's policy loss from hidden states, with the entropy as a metric, and its gradients of
hidden states and weight."""

import pytest

from ..methods.ceilings import THREE_GEMMS, TWO_GEMMS
from ..methods.policy import LIGER_GRPO
from .case import Case, Target, grid

OPERATION = "linear_ppo"
TARGETS = (
    Target("time", 1.15, "3 bare GEMMs"),
    Target("time", 0.5, "PyTorch"),
    Target("time", 1, LIGER_GRPO),
    Target("memory", 96),
)

CASES = {
    "linear_ppo fp32": Case(OPERATION, "fp32", ("hidden", "weight"), THREE_GEMMS, TARGETS, memory=True),
    "linear_ppo fp32, frozen head": Case(
        OPERATION, "fp32", ("hidden",), TWO_GEMMS, (Target("time", 1.15, "2 bare GEMMs"),)
    ),
}


@pytest.mark.parametrize(("case", "row"), grid(CASES))
def bench_linear_ppo(case, row, record):
    record(case, row)
