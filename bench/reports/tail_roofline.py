"""`python -m bench.reports.tail_roofline`: predicted time and memory of tail_eps on an H200, and the time
that screened logits would take there.

It counts what linear/tail_gpu.py moves and multiplies for cross-entropy in 16 bits, one block, by the share
of columns kept. Rates are those that an H200 reached on 26 November 2026 (docs/gpu.md): 685 TFLOP/s in a
head's bare GEMMs, 4.2 TB/s.

Of a screen, which no GPU runs yet, it counts one 8-bit GEMM at INT8, the directions that are exact, and the
bytes of coding the weight, of z8, and of the rows of the weight that exact logits need.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ..core.operation import Shape
from .roofline import Machine, Work, predict

INT8 = 1.3e15  # operations a second: issue 20's rate of an H200, not measured by us
EXACT_DIRECTIONS = 16
EXACT_COLUMNS = 330  # of a token; SmolLM2-135M, docs/screen.md
H200 = Machine("H200", 685e12, 67e12, 4.2e12, 1.0, 1.0)
SHAPES = (Shape(8192, 4096, 151936), Shape(8192, 896, 151936), Shape(8192, 576, 49152))

SCREENED_SHAPES = (*SHAPES[:1], Shape(16384, 2048, 151936), Shape(2048, 2048, 128256), *SHAPES[1:])


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


def screened_forward(shape: Shape, *, cached: bool, size: int = 2) -> Work:
    """Statistics with a screen, as csrc/screen takes them: no column is shared by tokens.

    cached: the rows of the weight that exact logits need cost no bytes, otherwise each is read from memory.
    """
    N, H, V = shape
    gemms = ((H200.rate("bf16") / INT8, N, V, H), (1.0, N, V, EXACT_DIRECTIONS))
    passes = (
        (size + 1) * V * H  # the weight is coded
        + size * N * V  # z8 is read for the columns that matter
        + (0 if cached else size * EXACT_COLUMNS * N * H)
    )
    return Work(gemms, passes, 0.0)


def screened_tail(shape: Shape, kept: Kept, *, cached: bool) -> Work:
    """Cross-entropy with a screen and a tail."""
    forward, exact = screened_forward(shape, cached=cached), tail(shape, kept)
    return Work((*forward.gemms, *exact.gemms[1:]), forward.pass_bytes + exact.pass_bytes, 0.0)


def screen_table() -> str:
    """Predicted milliseconds as Markdown, at the tail's 2^-14 and without gradients."""
    names = ("N × H × V", "3 GEMMs", "tail", "screen and tail", "1 GEMM", "screen, no gradients")
    lines = [f"| {' | '.join(names)} |", "|" + " --- |" * len(names)]
    kept = MEASURED[1]

    def ms(work: Work) -> float:
        return 1e3 * predict(work, H200, "bf16").seconds

    def span(works: Iterable[Work], bare: float) -> str:
        least, most = map(ms, works)
        return f"{least:.3g} to {most:.3g} ({least / bare:.2f} to {most / bare:.2f})"

    for shape in SCREENED_SHAPES:
        three, one = ms(floor(shape)), ms(Work(floor(shape).gemms[:1], 0.0, 0.0))
        trained = (screened_tail(shape, kept, cached=cached) for cached in (True, False))
        forward = (screened_forward(shape, cached=cached) for cached in (True, False))
        exact = (f"{three:.3g}", f"{ms(tail(shape, kept)):.3g}", span(trained, three))
        cells = (" × ".join(map(str, shape)), *exact, f"{one:.3g}", span(forward, one))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


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
    print(table(), screen_table(), sep="\n\n")
