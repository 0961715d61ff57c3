"""Time block sizes and warps of the tile kernels on a GPU: `python -m bench.gpu.tune_tiles [--json FILE]`.

It prints the pairs (BLOCK_SIZE, warps) of each entry of tile_rows_triton.LAUNCH at fp32 [1024, 151936] to
bf16, best first, from interleaved rounds. Nothing is tuned at run time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from unittest import mock

import torch

from fastalign.measure import interleaved
from fastalign_kernels.softmax import slice_rows_triton as slices
from fastalign_kernels.softmax import tile_rows_triton as rows
from fastalign_kernels.softmax.rows import Stat, Transform

Launch = tuple[int, int]  # BLOCK_SIZE, warps

ROUNDS = 9
GRID: list[Launch] = [
    (block, warps)
    for block, warps in product((1024, 2048, 4096, 8192), (4, 8, 16, 32))
    if 4 <= block // (32 * warps) <= 32
]


def _calls(lean: bool) -> dict[str, Callable[[], None]]:
    """A launch of each entry of LAUNCH."""
    C, V = 1024, 151936
    tile = torch.randn(C, V, device="cuda") * 2
    out = torch.empty(C, V, dtype=torch.bfloat16, device="cuda")
    ids = torch.randint(0, V, (C,), device="cuda")
    given = torch.zeros(4, C, device="cuda")
    given[:2] = torch.tensor([-1.0, 1.0], device="cuda")[:, None]
    tokens = rows.Rows(None, 0)
    softmaxes = rows.Softmaxes(ids, None, Transform(), torch.zeros(len(Stat), C, device="cuda"), lean)
    loss = rows.TokenLoss(torch.full((C,), 1.0 / C, device="cuda"), 0.0, 0.0)
    running = slices.new_running(ids)
    kind = "lean" if lean else "full"
    calls: dict[str, Callable[[], None]] = {
        f"stats_{kind}": partial(rows.tile_stats, tile, tokens, softmaxes),
        f"loss_{kind}": partial(rows.tile_loss, tile, tokens, softmaxes, loss, out),
        f"given_{kind}": partial(rows.tile_grad, tile, tokens, softmaxes, given, out),
        f"softmax_{kind}": partial(rows.tile_softmax, tile, tokens, softmaxes, out, 1.0),
        f"slice_{kind}": partial(slices.slice_stats, tile[:, :8192], tokens, softmaxes, running, 0, V),
    }
    if lean:
        calls["kept"] = partial(rows.kept_grad, out, out, tokens, softmaxes, given, 1.0)
    return calls


def _launched(entry: str, launch: Launch, call: Callable[[], None]) -> None:
    with mock.patch.dict(rows.LAUNCH[entry], {80: launch, 90: launch, 100: launch}):
        call()


def tune(entry: str, call: Callable[[], None]) -> list[tuple[float, Launch]]:
    """Milliseconds and launch, best first. A launch that fails is printed and left out."""
    runs: dict[str, Callable[[], None]] = {}
    for launch in GRID:
        run = partial(_launched, entry, launch, call)
        try:
            run()
        except Exception as error:
            print(f"{entry} {launch}: {type(error).__name__}: {str(error)[:200]}", flush=True)
        else:
            runs[str(launch)] = run
    timings = interleaved(runs, ROUNDS)
    return sorted((1e3 * timings[str(launch)].median, launch) for launch in GRID if str(launch) in timings)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.tune_tiles")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    found: dict[str, list[tuple[float, Launch]]] = {}
    for lean in (True, False):
        for entry, call in _calls(lean).items():
            found[entry] = tune(entry, call)
            best = "; ".join(f"{launch} {ms:.4f} ms" for ms, launch in found[entry][:6])
            print(f"{entry}: {best}", flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
