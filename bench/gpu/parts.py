"""The parts of a GPU check. A stage holds parts that run side by side."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .process import LIMIT, Part

TESTS, TIMES = "tests", "times"
SECONDS = 285  # a call of a check; a command on a lent machine ends after 5 minutes
FOR_TUNE = 40
FILES = (  # of tests that use the device
    "softmax/rows",
    "softmax/columns",
    "linear/tail",
    "linear/tail_calls",
    "kernels/logits",
    "linear/head",
    "linear/engine",
    "linear/epilogue",
    "linear/gpu_engines",
    "preference/preference",
    "preference/numbers",
    "preference/calls",
    "preference/refusals",
    "policy/policy",
    "policy/calls",
    "linear/policy_head",
    "policy/advantage",
    "linear/sequence_head",
    "kernels/sampling",
    "kernels/sampling_distribution",
    "kernels/derivatives",
    "kernels/nan",
    "kernels/native",
    "kernels/triton_options",
    "models/nn",
    "bench/measure",
    "models/causal_lm",
    "models/causal_lm_training",
    "models/causal_lm_refusals",
    "rollout/rollout",
    "rollout/steps_on_a_device",
    "rollout/refusals",
    "rollout/custom_generate",
    "stages/training",
)
SANITIZER = ("compute-sanitizer", "--error-exitcode", "9", "--tool")
INSTALL = ("-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--target")


def test_file(name: str) -> Path:
    """The path of one of FILES from the root."""
    folder, _, stem = name.rpartition("/")
    return Path("tests", folder, f"test_{stem}.py")


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
    """The tests that use the device, the longest first, with the sanitizers beside them."""
    python = sys.executable
    report = folder / "tests.json"
    workers = max(1, (os.cpu_count() or 1) - 2)  # two for the sanitizers
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
    files = [str(test_file(name)) for name in FILES]
    draw = (python, "-m", "bench.gpu.draw", "cuda")
    return [
        [
            Part("tests on the device", (python, "-m", "pytest", *options, *spread, *files), seconds, report),
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
