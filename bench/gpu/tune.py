"""Time block sizes and warps of the row kernels on a GPU: `python -m bench.gpu.tune`.

It prints the lines to paste into rows_triton.LAUNCH, because nothing is tuned at run time. The grid holds the
blocks of 1024 to 8192 logits with 4 to 64 logits a thread. The best pair has the least time on average over
the vocabularies, as a multiple of the fastest at each.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping
from unittest import mock

import torch

from fastalign.measure import interleaved
from fastalign_kernels.softmax.rows import Transform, row_grad, row_stats

from ..core.shapes import HEADS

Launch = tuple[int, int]  # BLOCK_SIZE, warps

GRID: list[Launch] = [
    (block, warps)
    for block in (1024, 2048, 4096, 8192)
    for warps in (1, 2, 4, 8, 16, 32)
    if 4 <= block // (32 * warps) <= 64
]
ROWS = 2048  # at V 49152 to 256000 fp32: 0.4 to 2.1 GB, many times any L2
ROUNDS = 20


def best(seconds: Mapping[int, Mapping[Launch, float]]) -> Launch:
    """The launch with the least time on average over the vocabularies, each as a multiple of the fastest
    there."""
    launches = next(iter(seconds.values()))
    multiples = {
        launch: [times[launch] / min(times.values()) for times in seconds.values()] for launch in launches
    }
    return min(multiples, key=lambda launch: statistics.mean(multiples[launch]))


def calls(V: int) -> dict[str, Callable[[], object]]:
    """The row kernels as the head runs them: fp32 logits, the gradient in bf16."""
    logits = torch.randn(1, ROWS, V, device="cuda").mul_(2)
    ids = torch.randint(0, V, (ROWS,), device="cuda")
    plain = Transform(1.0, 0.0, 1.0)
    stats = row_stats(logits, ids, None, plain)
    coefficients = torch.zeros(4, ROWS, device="cuda")
    coefficients[:2] = torch.tensor([-1.0, 1.0], device="cuda")[:, None]
    out = torch.empty(1, ROWS, V, dtype=torch.bfloat16, device="cuda")
    return {
        "row_stats": lambda: row_stats(logits, ids, None, plain),
        "row_grad": lambda: row_grad(logits, ids, None, plain, stats, coefficients, out),
    }


def tune(kernel: str, sm: int) -> Launch:
    """Time the grid at every vocabulary of HEADS, print it, and return the best launch."""
    from fastalign_kernels.softmax import rows_triton

    seconds: dict[int, dict[Launch, float]] = {}
    for V in sorted({V for _, V in HEADS.values()}):
        call = calls(V)[kernel]

        def launched(launch: Launch, call: Callable[[], object] = call) -> Callable[[], object]:
            def function() -> object:
                with mock.patch.dict(rows_triton.LAUNCH[kernel], {sm: launch}):
                    return call()

            return function

        timings = interleaved(
            {f"{block}, {warps}": launched((block, warps)) for block, warps in GRID}, ROUNDS
        )
        seconds[V] = {launch: timings[f"{launch[0]}, {launch[1]}"].median for launch in GRID}
        order = sorted(GRID, key=seconds[V].__getitem__)
        print(
            f"{kernel}, V {V}: "
            + "; ".join(f"{launch} {seconds[V][launch] * 1e3:.3f} ms" for launch in order[:5])
        )
    return best(seconds)


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("bench.gpu.tune: got no GPU, expected one to time the kernels on")
    major, minor = torch.cuda.get_device_capability()
    print(f"{torch.cuda.get_device_name()}, fp32 logits [{ROWS}, V], medians of {ROUNDS} interleaved rounds")
    for kernel in ("row_stats", "row_grad"):
        print(f'"{kernel}": {{{10 * major + minor}: {tune(kernel, 10 * major + minor)}}},')


if __name__ == "__main__":
    main()
