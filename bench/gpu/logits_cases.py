"""Losses and statistics from logits, and PPO's small losses: "All operations …" of docs/gpu.md."""

from __future__ import annotations

from ..core.operation import Shape
from ..methods.ceilings import COPIES, one_read, read_read_write
from .suite import operation_case

SHAPES = {"bf16": Shape(8192, 0, 128256), "fp32": Shape(4096, 0, 32768)}
TOKENS = Shape(512, 0, 4096)
TINY = Shape(8, 0, 64)
READ = {"one read (amax)": one_read}
READS = {"two reads, one write (amax, clone)": read_read_write}

CASES = (
    *(
        operation_case(
            f"cross_entropy {dtype}",
            "cross_entropy",
            shape,
            dtype=dtype,
            trained=("logits",),
            ceilings=READS,
            tiny=TINY,
            compiles=dtype == "bf16",
        )
        for dtype, shape in SHAPES.items()
    ),
    *(
        operation_case(
            f"token_stats {dtype}", "token_stats", shape, dtype=dtype, trained=(), ceilings=READ, tiny=TINY
        )
        for dtype, shape in SHAPES.items()
    ),
    operation_case(
        "ppo_loss fp32",
        "ppo",
        TOKENS,
        dtype="fp32",
        trained=("logp", "entropy"),
        ceilings=COPIES,
        tiny=TINY,
        compiles=True,
    ),
    operation_case("gae fp32", "gae", TOKENS, dtype="fp32", trained=(), ceilings=COPIES, tiny=TINY),
    operation_case(
        "masked_whiten fp32", "whiten", TOKENS, dtype="fp32", trained=(), ceilings=COPIES, tiny=TINY
    ),
    operation_case(
        "reward fp32",
        "reward",
        Shape(4096, 0, 0),
        dtype="fp32",
        trained=("chosen", "rejected"),
        ceilings=COPIES,
        tiny=Shape(8, 0, 0),
    ),
)
