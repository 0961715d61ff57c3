"""Time block sizes, warps and programs of the row kernels on a GPU: `python -m bench.gpu.tune`.

It prints the lines to paste into rows_triton.LAUNCH, because nothing is tuned at run time. The grid holds
blocks of 1024 to 16384 logits with 16 to 128 bytes of them a thread, and for row_loss as many programs a
multiprocessor as 2048 threads allow. The best launch has the least time on average over the vocabularies, as
a multiple of the fastest at each.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping
from unittest import mock

import torch

from fastalign.measure import interleaved
from fastalign_kernels.softmax.rows import NeedsStats, RowInputs, TokenLoss, Transform, row_grad, row_stats
from fastalign_kernels.softmax.rows import row_loss as loss_and_gradient

from ..core.shapes import HEADS

Launch = tuple[int, int, int]  # BLOCK_SIZE, warps, programs of a multiprocessor

KERNELS = ("row_stats", "row_grad", "row_loss")
ROWS = 2048  # at V 49152 to 256000: 0.2 to 2.1 GB, many times any L2
ROUNDS = 20
DTYPES = {16: torch.bfloat16, 32: torch.float32}


def grid(kernel: str, bits: int) -> list[Launch]:
    """The launches that are timed."""
    return [
        (block, warps, programs)
        for block in (1024, 2048, 4096, 8192, 16384)
        for warps in (2, 4, 8, 16, 32)
        if 16 <= block * bits // 8 // (32 * warps) <= 128
        for programs in ((1, 2, 4, 8) if kernel == "row_loss" else (0,))
        if programs * warps <= 64
    ]


def best(seconds: Mapping[int, Mapping[Launch, float]]) -> Launch:
    """The launch with the least time on average over the vocabularies, each as a multiple of the fastest
    there."""
    launches = next(iter(seconds.values()))
    multiples = {
        launch: [times[launch] / min(times.values()) for times in seconds.values()] for launch in launches
    }
    return min(multiples, key=lambda launch: statistics.mean(multiples[launch]))


def calls(V: int, bits: int) -> dict[str, Callable[[], object]]:
    """The row kernels as the losses from logits run them."""
    logits = torch.randn(1, ROWS, V, device="cuda", dtype=DTYPES[bits]).mul_(2)
    ids = torch.randint(0, V, (ROWS,), device="cuda")
    plain, lean = Transform(1.0, 0.0, 1.0), NeedsStats(mean_logp=False, entropy=False)
    stats = row_stats(logits, ids, None, plain, lean)
    coefficients = torch.zeros(4, ROWS, device="cuda")
    coefficients[:2] = torch.tensor([-1.0, 1.0], device="cuda")[:, None]
    out = torch.empty_like(logits)
    loss = TokenLoss(torch.full((ROWS,), 1 / ROWS, device="cuda"), 0.0, 0.0)
    return {
        "row_stats": lambda: row_stats(logits, ids, None, plain, lean),
        "row_grad": lambda: row_grad(logits, ids, None, plain, stats, coefficients, out, lean),
        "row_loss": lambda: loss_and_gradient(RowInputs(logits, ids, None, plain), loss, out),
    }


def tune(kernel: str, bits: int, sm: int) -> Launch:
    """Time the grid at every vocabulary of HEADS, print it, and return the best launch."""
    from fastalign_kernels.softmax import rows_triton

    seconds: dict[int, dict[Launch, float]] = {}
    launches = grid(kernel, bits)
    for V in sorted({V for _, V in HEADS.values()}):
        call = calls(V, bits)[kernel]

        def launched(launch: Launch, call: Callable[[], object] = call) -> Callable[[], object]:
            def function() -> object:
                table = {f"{kernel}_{bits}": {sm: rows_triton.Launch(*launch)}}
                with mock.patch.dict(rows_triton.LAUNCH, table):
                    return call()

            return function

        timings = interleaved({str(launch): launched(launch) for launch in launches}, ROUNDS)
        seconds[V] = {launch: timings[str(launch)].median for launch in launches}
        order = sorted(launches, key=seconds[V].__getitem__)
        print(
            f"{kernel}_{bits}, V {V}: "
            + "; ".join(f"{launch} {seconds[V][launch] * 1e3:.3f} ms" for launch in order[:5])
        )
    return best(seconds)


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("bench.gpu.tune: got no GPU, expected one to time the kernels on")
    major, minor = torch.cuda.get_device_capability()
    print(f"{torch.cuda.get_device_name()}, logits [{ROWS}, V], medians of {ROUNDS} interleaved rounds")
    for kernel in KERNELS:
        for bits in DTYPES:
            found = tune(kernel, bits, 10 * major + minor)
            print(f'"{kernel}_{bits}": {{{10 * major + minor}: Launch{found}}},')


if __name__ == "__main__":
    main()
