"""Time tilings of the epilogue's forward kernel on a GPU: `python -m bench.gpu.tune_epilogue [--json FILE]`.

At each shape it prints the tilings of GRID, best first, as multiples of cuBLAS's GEMM in the same
interleaved rounds: with e kept and two statistics (lean) or all (full), and with nothing kept. What is best
fills TILES of linear/gpu/epilogue.py by hand, if `bench.gpu.aot` compiles it without spills. The compilations
come first, in processes side by side.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fastalign.measure import interleaved
from fastalign_kernels.linear.engine import empty_stats
from fastalign_kernels.linear.gpu.epilogue_call import CallTiles, EpilogueCall, Tiles
from fastalign_kernels.linear.inputs import HeadInputs
from fastalign_kernels.linear.options import HeadOptions

from ..core.operation import Shape
from ..methods.head import head_inputs
from .head_cases import SHAPES

KINDS = ("lean", "full", "not kept")
BRANCH, PLAIN = Tiles(stages=3, parts=2), Tiles(stages=3, parts=2, branch=False)
GRID = (
    Tiles(),
    Tiles(group=32),
    BRANCH,
    BRANCH._replace(stages=4),
    BRANCH._replace(group=16),
    BRANCH._replace(group=32),
    PLAIN,
    PLAIN._replace(group=16),
    PLAIN._replace(group=32),
)
PROCESSES = 8


def _inputs(shape: Shape, kind: str) -> HeadInputs:
    tensors = head_inputs(shape, torch.bfloat16, "cuda")
    return HeadInputs(
        tensors["hidden"], tensors["weight"], tensors["ids"], None, HeadOptions(lean=kind != "full")
    )


def _forward(inputs: HeadInputs, tiles: Tiles, kept: Tensor | None) -> None:
    """The kernels that make statistics, and e in `kept`."""
    processors = torch.cuda.get_device_properties(inputs.hidden.device).multi_processor_count
    call = EpilogueCall(inputs, CallTiles(tiles, tiles), processors)
    call.forward(0, inputs.hidden.shape[0], empty_stats(inputs), kept)


def _runs(shape: Shape) -> dict[str, Callable[[], object]]:
    """cuBLAS's GEMM and the tilings that run, by name."""
    kept = torch.empty(shape.N, shape.V, dtype=torch.bfloat16, device="cuda")
    runs: dict[str, Callable[[], object]] = {}
    for kind in KINDS:
        inputs = _inputs(shape, kind)
        runs["cuBLAS"] = partial(torch.mm, inputs.hidden, inputs.weight.t(), out=kept)
        for tiles in GRID:
            run = partial(_forward, inputs, tiles, None if kind == "not kept" else kept)
            try:
                run()
                torch.cuda.synchronize()
            except Exception as error:
                print(f"{kind} {tuple(tiles)}: {type(error).__name__}: {str(error)[:200]}", flush=True)
            else:
                runs[f"{kind} {tuple(tiles)}"] = run
    return runs


def _compile(part: int) -> None:
    """Compile the tilings of a process."""
    shape = Shape(256, 576, 49152)
    kept = torch.empty(shape.N, shape.V, dtype=torch.bfloat16, device="cuda")
    for kind in KINDS:
        inputs = _inputs(shape, kind)
        for tiles in GRID[part::PROCESSES]:
            try:
                _forward(inputs, tiles, None if kind == "not kept" else kept)
                torch.cuda.synchronize()
            except Exception as error:
                print(f"{kind} {tuple(tiles)}: {type(error).__name__}: {str(error)[:200]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.tune_epilogue")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", type=int, metavar="PART", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compile is not None:
        _compile(arguments.compile)
        return
    command = [sys.executable, "-m", "bench.gpu.tune_epilogue", "--compile"]
    processes = [subprocess.Popen([*command, str(part)]) for part in range(PROCESSES)]
    for process in processes:
        process.wait()
    found: dict[str, dict[str, float]] = {}
    for shape in SHAPES:
        timings = interleaved(_runs(shape), arguments.rounds, queued=True)
        floor = timings.pop("cuBLAS")
        ratios = {name: timing.over(floor) for name, timing in timings.items()}
        found["{} × {} × {}".format(*shape)] = ratios
        print(f"{tuple(shape)}: cuBLAS {1e3 * floor.median:.3f} ms")
        for name, ratio in sorted(ratios.items(), key=lambda item: item[1]):
            print(f"  {ratio:.3f} {name}", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
