"""The tail-compensated backward pass on SmolLM2-135M's softmax, against bare GEMMs of which it leaves columns out."""

import pytest

from .bench_linear_cross_entropy import THREE
from .bench_linear_dpo import FOUR
from .operation import EAGER, Shape
from .preference_methods import LIGER_DPO
from .shapes import DTYPE, HEADS
from .suite import Case, Target, grid
from .tail_methods import EPS

SMOLLM2 = HEADS["SmolLM2-135M"]
SMALL, LARGE = EPS
TRAINED = ("hidden", "weight")

CASES = {
    f"linear_cross_entropy {DTYPE}, tail": Case(
        "linear_cross_entropy, tail",
        DTYPE,
        TRAINED,
        THREE,
        (Target("time", 0.62, "3 bare GEMMs", SMALL), Target("time", 0.52, "3 bare GEMMs", LARGE), Target("time", 1.05, "3 bare GEMMs")),
        Shape(2048, *SMOLLM2),
        memory=True,
    ),
    f"linear_dpo {DTYPE}, tail": Case(
        "linear_dpo, tail",
        DTYPE,
        TRAINED,
        FOUR,
        (Target("time", 0.5, EAGER, SMALL), Target("time", 0.3, LIGER_DPO, SMALL)),
        Shape(2048, *SMOLLM2),
    ),
}


@pytest.mark.parametrize(("case", "row"), grid(CASES))
def bench_tail(case, row, record):
    record(case, row)
