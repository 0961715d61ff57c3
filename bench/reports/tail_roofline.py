"""`python -m bench.reports.tail_roofline`: predicted time and memory of tail_eps on an H200.

It counts what linear/tail_gpu.py moves and multiplies for cross-entropy in 16 bits, one block, by the share
of columns kept. Rates are those that an H200 reached on 26 November 2026 (docs/gpu.md): 685 TFLOP/s in a
head's bare GEMMs, 4.2 TB/s.
"""

from __future__ import annotations

from typing import NamedTuple

from ..core.operation import Shape
from .roofline import Machine, Work, predict

H200 = Machine("H200", 685e12, 67e12, 4.2e12, 1.0, 1.0)
SHAPES = (Shape(8192, 4096, 151936), Shape(8192, 896, 151936), Shape(8192, 576, 49152))


class Kept(NamedTuple):
    """Shares of the columns: of a part of 1024 tokens, and of all parts together."""

    name: str
    part: float
    block: float


# Measured on a CPU: SmolLM2-135M, V 49152, on Python's language reference, 8 parts, in tiles of 128 columns
MEASURED = (Kept("SmolLM2-135M, 2^-12", 0.219, 0.373), Kept("SmolLM2-135M, 2^-14", 0.361, 0.572))


def floor(shape: Shape) -> Work:
    """Three bare GEMMs."""
    N, H, V = shape
    return Work(((1.0, N, V, H), (1.0, N, H, V), (1.0, V, H, N)), 0.0, 0.0)


def tail(shape: Shape, kept: Kept, size: int = 2) -> Work:
    """Cross-entropy with gradients of hidden states and weight."""
    N, H, V = shape
    passes = (
        2 * size * N * V  # e is read for the sums of the columns, and for dlogits
        + size * kept.part * N * V  # dlogits of kept columns are written
        + 2 * size * kept.block * V * H  # rows of the weight are gathered for dX
        + size * V * H  # the weight is read for its product with q
        + size * (1 - kept.part) * V * H  # dW of dropped columns is written
    )
    e, dlogits, gathered = size * N * V, size * kept.block * N * V, size * kept.block * V * H
    gradients = size * (V * H + N * H)
    gemms = ((1.0, N, V, H), (kept.part, N, H, V), (kept.part, V, H, N))
    return Work(gemms, passes, max(e + dlogits, dlogits + gathered + gradients) + size * N * H)


def table() -> str:
    """The predictions as Markdown."""
    lines = [
        "| N × H × V | columns kept | of a part | ms | × 3 GEMMs | MiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for shape in SHAPES:
        bare = predict(floor(shape), H200, "bf16").seconds
        for kept in MEASURED:
            found = predict(tail(shape, kept), H200, "bf16")
            cells = (
                " × ".join(map(str, shape)),
                kept.name,
                f"{kept.part:.0%}",
                f"{found.seconds * 1e3:.3g}",
                f"{found.seconds / bare:.2f}",
                f"{found.mib:,.0f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
