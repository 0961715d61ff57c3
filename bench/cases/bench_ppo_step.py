"""A whole step of PPO at a large vocabulary: 64 completions of 16 tokens by the demo's model, and one update
of all its weights."""

import pytest

from ..core.operation import EAGER, Shape
from ..methods.ppo import head_gemms
from .case import Case, Target, grid

CEILING = {"the head's bare GEMMs": head_gemms}

CASES = {
    "ppo_step fp32": Case(
        "ppo_step", "fp32", (), CEILING, (Target("time", 1 / 5, EAGER),), Shape(1024, 128, 49152)
    )
}


@pytest.mark.parametrize(("case", "row"), grid(CASES))
def bench_ppo_step(case, row, record):
    record(case, row)
