"""A minibatch of PPO's policy loss from hidden states, with the entropy as a metric, and its gradients of
hidden states and weight."""

import pytest

from ..methods.ceilings import bare_gemms
from ..methods.policy import LIGER_GRPO
from .case import Case, Target, grid

OPERATION = "linear_ppo"
THREE = {
    "3 bare GEMMs": bare_gemms(1, hidden_grad=True, weight_grad=True),
    "3 bare GEMMs, gemm.py": bare_gemms(1, hidden_grad=True, weight_grad=True, ours=True),
}
TWO = {
    "2 bare GEMMs": bare_gemms(1, hidden_grad=True),
    "2 bare GEMMs, gemm.py": bare_gemms(1, hidden_grad=True, ours=True),
}
TARGETS = (
    Target("time", 1.15, "3 bare GEMMs"),
    Target("time", 0.5, "PyTorch"),
    Target("time", 1, LIGER_GRPO),
    Target("memory", 96),
)

CASES = {
    "linear_ppo fp32": Case(OPERATION, "fp32", ("hidden", "weight"), THREE, TARGETS, memory=True),
    "linear_ppo fp32, frozen head": Case(
        OPERATION, "fp32", ("hidden",), TWO, (Target("time", 1.15, "2 bare GEMMs"),)
    ),
}


@pytest.mark.parametrize(("case", "row"), grid(CASES))
def bench_linear_ppo(case, row, record):
    record(case, row)
