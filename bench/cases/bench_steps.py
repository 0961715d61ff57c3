"""A whole step of each stage: what the losses are worth beside the rest of the training."""

import pytest

from ..core.operation import Shape
from ..core.shapes import DTYPE, HEADS
from ..methods.steps import BACKBONE, STAGES, without_loss
from .case import Case, Target, grid

# 2 to 4 s a step on two cores, most of it outside the head
SHAPE = Shape(256 if DTYPE == "fp32" else 8192, *HEADS["SmolLM2-135M"])
CASES = {
    f"{stage} step {DTYPE}": Case(
        f"{stage} step",
        DTYPE,
        (),
        {BACKBONE: without_loss(stage)},
        # A reward model has no head over the vocabulary to make faster; its loss must add nothing.
        (Target("time", 1.05, BACKBONE) if stage == "reward" else Target("time", 1, "PyTorch"),),
        shape=SHAPE,
        memory=stage in ("pretrain", "dpo"),
    )
    for stage in STAGES
}


@pytest.mark.parametrize(("case", "row"), grid(CASES))
def bench_steps(case, row, record):
    record(case, row)
