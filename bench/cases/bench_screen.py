"""8-bit logits with exact ones where they matter, on SmolLM2-135M's softmax and on an untrained one."""

import pytest

from ..core.operation import OURS, Shape
from ..core.shapes import DTYPE, HEADS
from ..methods.ceilings import ONE_GEMM, THREE_GEMMS
from ..methods.screen import BOTH, SCREENED
from ..methods.tail import SMALL
from .case import Case, Target, grid

SHAPE = Shape(2048, *HEADS["SmolLM2-135M"])

CASES = {
    f"linear_cross_entropy {DTYPE}, screen": Case(
        "linear_cross_entropy, screen",
        DTYPE,
        ("hidden", "weight"),
        THREE_GEMMS,
        (Target("time", 0.75, SMALL, BOTH), Target("time", 0.45, OURS, BOTH)),
        shape=SHAPE,
        memory=True,
    ),
    f"linear_logprobs {DTYPE}, screen, no gradients": Case(
        "linear_logprobs, screen",
        DTYPE,
        (),
        ONE_GEMM,
        (Target("time", 0.55, OURS, SCREENED),),
        shape=SHAPE,
        memory=True,
    ),
    f"linear_logprobs {DTYPE}, screen, untrained, no gradients": Case(
        "linear_logprobs, screen, untrained",
        DTYPE,
        (),
        ONE_GEMM,
        (Target("time", 1.05, OURS, SCREENED),),
        shape=SHAPE,
    ),
}


@pytest.mark.parametrize(("case", "row"), grid(CASES))
def bench_screen(case, row, record):
    record(case, row)
