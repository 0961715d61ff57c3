"""`python -m bench.reports.tail_roofline`: predicted time and memory of tail_eps on an H200, and the time
that screened logits would take there.

It counts what linear/gpu/tail.py moves and multiplies for cross-entropy in 16 bits, one block, by the share
of columns kept. Rates are those that an H200 reached on 26 November 2026 (docs/gpu.md): 685 TFLOP/s in a
head's bare GEMMs, 4.2 TB/s.

Of a screen it counts what linear/gpu/screen.py does: an 8-bit GEMM at one of INT8, the directions that are
exact, a GEMM over the columns that matter, and the bytes of the weight's codes and of e. No GPU has run it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ..core.operation import Shape
from .roofline import Machine, Work, predict

# Operations a second in 8 bits, not measured by us: what is said of an H200, and what is left if the kernel,
# whose products Triton does not overlap from step to step, loses a quarter.
INT8 = (1.3e15, 1.0e15)
LOW_WIDTH = 64  # numbers of a row in the product for the exact directions
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
UNTAILED = 0.105  # of a screen without gradients: parts of 256 tokens at 2^-11, 2048 tokens of English text


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


def screened_forward(shape: Shape, kept: float, int8: float, size: int = 2) -> Work:
    """Statistics with a screen. kept: share of the columns in tiles that a part keeps."""
    N, H, V = shape
    gemms = ((H200.rate("bf16") / int8, N, V, H), (1.0, N, V, LOW_WIDTH), (kept, N, V, H))
    passes = (
        (size + 1) * V * H  # the weight is coded
        + 3 * size * N * V  # e is written, and read for the columns and for the rest
        + 2 * size * kept * V * H  # rows of the weight are gathered
        + size * kept * N * V  # p is written
    )
    return Work(gemms, passes, 0.0)


def screened_tail(shape: Shape, kept: Kept, int8: float, size: int = 2) -> Work:
    """Cross-entropy with a screen and a tail."""
    N, _, V = shape
    forward, exact = screened_forward(shape, kept.part, int8), tail(shape, kept)
    # Bytes of e that the tail reads and writes, and that the screen has counted
    of_e = (2 * size + size * kept.part) * N * V
    finished = 2 * size * kept.part * N * V  # p becomes dlogits
    passes = forward.pass_bytes + exact.pass_bytes - of_e + finished
    return Work((*forward.gemms, *exact.gemms[1:]), passes, 0.0)


def screen_table() -> str:
    """Predicted milliseconds as Markdown, with tails and without gradients."""
    tails = [name for kept in MEASURED[::-1] for name in (f"tail {kept.name.split()[1]}", "with a screen")]
    names = ("N × H × V", "3 GEMMs", *tails, "1 GEMM", "screen, no gradients")
    lines = [f"| {' | '.join(names)} |", "|" + " --- |" * len(names)]

    def ms(work: Work) -> float:
        return 1e3 * predict(work, H200, "bf16").seconds

    def span(works: Iterable[Work], bare: float) -> str:
        least, most = map(ms, works)
        return f"{least:.3g} to {most:.3g} ({least / bare:.2f} to {most / bare:.2f})"

    for shape in SCREENED_SHAPES:
        three, one = ms(floor(shape)), ms(Work(floor(shape).gemms[:1], 0.0, 0.0))
        cells = [" × ".join(map(str, shape)), f"{three:.3g}"]
        for kept in MEASURED[::-1]:
            exact = ms(tail(shape, kept))
            screened = [screened_tail(shape, kept, int8) for int8 in INT8]
            cells += [f"{exact:.3g} ({exact / three:.2f})", span(screened, three)]
        forward = [screened_forward(shape, UNTAILED, int8) for int8 in INT8]
        lines.append(f"| {' | '.join([*cells, f'{one:.3g}', span(forward, one)])} |")
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
