"""Time and peak memory of linear_cross_entropy against the tokens of a sequence and against the vocabulary:
for plots.py."""

import pytest

from ..core.operation import EAGER, OURS
from ..core.shapes import DTYPE, USUAL
from ..methods.ceilings import bare_gemms
from ..methods.cross_entropy import CHUNKED
from .case import Case, grid

OPERATION = "linear_cross_entropy"
CEILING = {"3 bare GEMMs": bare_gemms(1, hidden_grad=True, weight_grad=True)}
SHAPES = [
    USUAL._replace(N=USUAL.N // 4),
    USUAL._replace(N=USUAL.N * 2),
    USUAL._replace(V=USUAL.V // 6),
    USUAL._replace(V=USUAL.V // 2),
]
CASES = {
    f"{OPERATION} {DTYPE}, N {shape.N}, V {shape.V}": Case(
        OPERATION,
        DTYPE,
        ("hidden", "weight"),
        CEILING,
        (),
        shape=shape,
        memory=shape.V == USUAL.V,
        only=(OURS, EAGER, CHUNKED),
    )
    for shape in SHAPES
}


@pytest.mark.parametrize(("case", "row"), grid(CASES))
def bench_scaling(case, row, record):
    record(case, row)
