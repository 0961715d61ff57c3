"""A token from each row of logits that exist already, filtered or not; ours with its log-probabilities, kept
mass and entropy."""

import pytest

from ..core.operation import Shape
from ..methods.ceilings import one_read
from ..methods.sampling import MULTINOMIAL, TRANSFORMERS
from .case import Case, Target, grid

READ = "one read (amax)"
CEILING = {READ: one_read}
QWEN = Shape(64, 0, 151936)
# 36 MiB as QWEN: the read that the target compares with comes from memory, not from an L3 cache
SMOLLM2 = Shape(192, 0, 49152)
NUCLEUS = "sample, top_p 0.9 at T 0.7"
PEAKED = (Target("time", 4, READ), Target("time", 1 / 30, TRANSFORMERS))

CASES = {
    "sample fp32, no filter": Case(
        "sample", "fp32", (), CEILING, (Target("time", 1 / 12, MULTINOMIAL),), shape=QWEN
    ),
    "sample fp32, top_k 50": Case(
        "sample, top_k 50", "fp32", (), CEILING, (Target("time", 1 / 20, TRANSFORMERS),), shape=QWEN
    ),
    "sample fp32, top_p 0.9 at T 0.7": Case(
        NUCLEUS, "fp32", (), CEILING, (Target("time", 1 / 30, TRANSFORMERS),), shape=QWEN, memory=True
    ),
    "sample fp32, top_p 0.9 at T 0.7, trained-like logits": Case(
        f"{NUCLEUS}, trained-like logits", "fp32", (), CEILING, PEAKED, shape=QWEN
    ),
    "sample fp32, top_p 0.9 at T 0.7, SmolLM2-135M's logits": Case(
        f"{NUCLEUS}, SmolLM2's logits", "fp32", (), CEILING, PEAKED, shape=SMOLLM2
    ),
}


@pytest.mark.parametrize(("case", "row"), grid(CASES))
def bench_sampling(case, row, record):
    record(case, row)
