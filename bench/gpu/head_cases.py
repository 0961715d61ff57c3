"""Losses from hidden states in bf16: "All operations beside their peers" of docs/gpu.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from ..core.operation import EAGER, OURS, Ceiling, Shape
from ..methods.ceilings import bare_gemms
from .case import GpuCase
from .suite import operation_case

MAIN = Shape(8192, 4096, 151936)
SHAPES = (
    MAIN,
    Shape(8192, 896, 151936),
    Shape(8192, 576, 49152),
    Shape(2048, 2048, 128256),
    Shape(16384, 2048, 151936),
)
LARGEST = Shape(16384, 2048, 248320)
COMPILED_AT = SHAPES[:3]  # torch.compile takes half a minute for each
BOTH = ("hidden", "weight")
FEW = (OURS, EAGER, "torch.compile", "TRL ChunkedLogProbFunction", "Liger fused linear CE")


def gemms(forward: int, hidden: bool = False, weight: bool = False) -> Mapping[str, Ceiling]:
    """torch's GEMMs of a head into fresh memory: `forward` of the logits, and one for each gradient."""
    number = forward + hidden + weight
    return {
        f"{number} bare GEMM{'s' if number > 1 else ''}": bare_gemms(
            forward, hidden_grad=hidden, weight_grad=weight
        )
    }


def _named(operation: str, shape: Shape, detail: str = "") -> str:
    """The case's name. At MAIN it is the suite's, which the tables of README.md look for."""
    return f"{operation} bf16{detail}" + ("" if shape == MAIN else f", {shape.N} × {shape.H} × {shape.V}")


def cross_entropy(shape: Shape) -> GpuCase:
    return operation_case(
        _named("linear_cross_entropy", shape),
        "linear_cross_entropy",
        shape,
        trained=BOTH,
        ceilings=gemms(1, hidden=True, weight=True),
        only=() if shape == MAIN else FEW,
        compiles=shape in COMPILED_AT,
    )


def other_losses(shape: Shape) -> Iterator[GpuCase]:
    """Log-probabilities, DPO and KTO with the reference's pass, PPO, a frozen head, and no gradients."""
    only = () if shape == MAIN else (OURS, EAGER)
    for operation, forwards in (("logprobs", 1), ("dpo", 2), ("kto", 2), ("ppo", 1)):
        yield operation_case(
            _named(f"linear_{operation}", shape),
            f"linear_{operation}",
            shape,
            trained=BOTH,
            ceilings=gemms(forwards, hidden=True, weight=True),
            only=only,
            compiles=shape == MAIN,
        )
    untrained = partial(operation_case, operation="linear_cross_entropy", shape=shape, only=(OURS, EAGER))
    frozen = _named("linear_cross_entropy", shape, ", frozen head")
    yield untrained(frozen, trained=("hidden",), ceilings=gemms(1, hidden=True))
    yield untrained(_named("linear_cross_entropy", shape, ", no gradients"), trained=(), ceilings=gemms(1))


SMALL = Shape(8192, 576, 49152)  # SmolLM2-135M's
CASES = (
    cross_entropy(MAIN),
    cross_entropy(SMALL),
    *other_losses(MAIN),
    *other_losses(SMALL),
    *(cross_entropy(shape) for shape in (*SHAPES, LARGEST) if shape not in (MAIN, SMALL)),
    *(case for shape in SHAPES if shape not in (MAIN, SMALL) for case in other_losses(shape)),
)
