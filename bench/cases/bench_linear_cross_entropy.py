"""Cross-entropy from hidden states: trained, below a frozen head as in LoRA runs, and without gradients."""

import pytest

from ..core.operation import Shape
from ..core.shapes import DTYPE, HALF, HEAD, HEADS
from ..methods.ceilings import ONE_GEMM, THREE_GEMMS, TWO_GEMMS
from ..methods.cross_entropy import LINEAR_CROSS_ENTROPY
from .case import Case, Target, grid

OPERATION = "linear_cross_entropy"
# Slow fallbacks on a CPU, and F.linear_cross_entropy in 64 chunks: they take two to four times as long as all
# other methods together.
SLOW = (
    "F.linear_cross_entropy, options as torch picks them",
    "TRL ChunkedLogProbFunction",
    "Liger fused linear Scaled CE",
)
QUICK = tuple(name for name in LINEAR_CROSS_ENTROPY.methods if DTYPE == "bf16" or name not in SLOW)
MOST = tuple(name for name in LINEAR_CROSS_ENTROPY.methods if name not in SLOW[:1])

CASES = {
    "linear_cross_entropy fp32": Case(
        OPERATION,
        "fp32",
        ("hidden", "weight"),
        THREE_GEMMS,
        (Target("time", 1.1, "3 bare GEMMs"), Target("memory", 96), Target("error", 2, "PyTorch")),
        memory=True,
    ),
    "linear_cross_entropy bf16": Case(
        OPERATION,
        "bf16",
        ("hidden", "weight"),
        THREE_GEMMS,
        (Target("time", 1, "PyTorch"), Target("error", 1, "PyTorch")),
        shape=None if DTYPE == "bf16" else HALF,
        memory=DTYPE == "bf16",
    ),
    f"linear_cross_entropy {DTYPE}, frozen head": Case(
        OPERATION,
        DTYPE,
        ("hidden",),
        TWO_GEMMS,
        (Target("time", 1.1, "2 bare GEMMs"), Target("error", 2, "PyTorch")),
        shape=HALF,
        only=MOST,
    ),
    f"linear_cross_entropy {DTYPE}, no gradients": Case(
        OPERATION, DTYPE, (), ONE_GEMM, (Target("time", 1.1, "1 bare GEMM"),), shape=HALF, only=MOST
    ),
    # A trained model's softmax is nearly empty, which helps methods that drop small probabilities.
    f"linear_cross_entropy {DTYPE}, SmolLM2-135M's softmax": Case(
        f"{OPERATION}, SmolLM2's softmax",
        DTYPE,
        ("hidden", "weight"),
        THREE_GEMMS,
        (),
        shape=Shape(512, *HEADS["SmolLM2-135M"]),
        only=QUICK,
    ),
    # Other models' heads, as far as they fit the machine.
    **{
        f"linear_cross_entropy {DTYPE}, {head}": Case(
            OPERATION, DTYPE, ("hidden", "weight"), THREE_GEMMS, (), head=head, only=QUICK
        )
        for head in HEADS
        if head != HEAD
    },
}


@pytest.mark.parametrize(("case", "row"), grid(CASES))
def bench_linear_cross_entropy(case, row, record):
    record(case, row)
