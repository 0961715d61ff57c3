"""log P[id], entropy, logsumexp and top-1 of each row of logits that exist already."""

import pytest

from ..methods.ceilings import one_read
from ..methods.cross_entropy import LOGP_ONLY
from .case import Case, Target, grid

OPERATION = "token_stats"
CEILING = {"one read (amax)": one_read}

CASES = {
    "token_stats fp32": Case(
        OPERATION, "fp32", (), CEILING, (Target("time", 0.2, LOGP_ONLY), Target("error", 2, "PyTorch"))
    ),
    "token_stats bf16": Case(OPERATION, "bf16", (), CEILING, (Target("error", 2, "PyTorch"),)),
}


@pytest.mark.parametrize(("case", "row"), grid(CASES))
def bench_token_stats(case, row, record):
    record(case, row)
