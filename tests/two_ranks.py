"""Runs a test file as a script in some processes, which are the ranks of a process group."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def run_as_two_ranks(script: str, folder: Path) -> None:
    """`run_as_ranks` with two."""
    run_as_ranks(script, folder, 2)


def run_as_ranks(script: str, folder: Path, number: int) -> None:
    """Run `python script folder rank number` for all ranks; one that fails or hangs fails the test."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(folder), str(rank), str(number)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(number)
    ]
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert not any(rank.returncode for rank in ranks), "\n".join(errors)


def be_a_rank(run_rank: Callable[[Path, int], None]) -> None:
    """What such a script does: `run_rank(folder, rank)` of its arguments, and the end of the process."""
    run_rank(Path(sys.argv[1]), int(sys.argv[2]))
    # Not by return: gloo's threads live on, and one that drops a tensor while the interpreter shuts down ends
    # the process with "terminate called without an active exception" (seen once in CI, on a rank with nothing
    # to save).
    sys.stderr.flush()
    os._exit(0)
