"""The parts of a GPU check. A stage holds parts that run side by side."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .longest_first import OF_DEVICE
from .process import LIMIT, ROOT, Part

TESTS, TIMES = "tests", "times"
SECONDS = 285  # a call of a check; a command on a lent machine ends after 5 minutes
FOR_TUNE = 40
SANITIZER = ("compute-sanitizer", "--error-exitcode", "9", "--tool")
INSTALL = ("-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--target")


def files() -> list[str]:
    """The files that have tests of the device, by their paths from the root: few of them import transformers,
    which takes each worker seconds."""
    found = (path for path in (ROOT / "tests").rglob("test_*.py") if OF_DEVICE.search(path.read_text()))
    return sorted(str(path.relative_to(ROOT)) for path in found)


def prepared(wheels: Sequence[Path], site: Path) -> list[list[Part]]:
    """The stages that both calls begin with: which machine, the peers' wheels, the library."""
    python = sys.executable
    peers = [Part("peers", (python, *INSTALL, str(site), *map(str, wheels)), 40)] if wheels else []
    return [
        [Part("GPU and driver", ("nvidia-smi",), 10), Part("nvcc", ("nvcc", "--version"), 10), *peers],
        [
            Part("library", (python, "-m", "bench.gpu.library"), 100),
            Part("environment", (python, "-m", "fastalign", "env"), 30),
        ],
    ]


def tests(seconds: float, folder: Path) -> list[list[Part]]:
    """The tests that use the device, the longest first, with head_check and the sanitizers beside them."""
    python = sys.executable
    report, heads = folder / "tests.json", folder / "heads.json"
    workers = max(1, (os.cpu_count() or 1) - 3)
    head_check = (python, "-m", "bench.gpu.head_check", "--json", str(heads), "--seconds", LIMIT)
    options = (
        "-q",
        "-rfE",
        "--tb",
        "short",
        "-p",
        "no:cacheprovider",
        "-p",
        "bench.gpu.longest_first",
        "--seconds-to",
        str(report),
    )
    spread = ("-n", str(workers), "--dist", "load", "--maxschedchunk", "1")
    draw = (python, "-m", "bench.gpu.draw", "cuda")
    return [
        [
            Part(
                "tests on the device", (python, "-m", "pytest", *options, *spread, *files()), seconds, report
            ),
            Part("engines of the head against fp64", head_check, seconds, heads),
            Part("memcheck of the sampler", (*SANITIZER, "memcheck", *draw), seconds),
            Part("racecheck of the sampler", (*SANITIZER, "racecheck", *draw), seconds),
        ]
    ]


def times(seconds: float, output: Path) -> list[list[Part]]:
    """The times, whose rows go to the output as they are measured, then the grids of the row kernels."""
    python = sys.executable
    command = (python, "-m", "bench.gpu.times", "--output", str(output), "--seconds", LIMIT)
    return [
        [Part("times", command, seconds, leaves=FOR_TUNE)],
        [Part("tune", (python, "-m", "bench.gpu.tune"), FOR_TUNE)],
    ]
