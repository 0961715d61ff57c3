"""Runs a test file as a script in some processes, which are the ranks of a process group."""

import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from tests.stages.ranks import RANKS, end_ranks, write_to


def run_as_two_ranks(script: str, folder: Path) -> None:
    """`run_as_ranks` with two."""
    run_as_ranks(script, folder, 2)


def run_as_ranks(script: str, folder: Path, number: int) -> None:
    """Run `python script folder rank number` for all ranks; one that fails or hangs fails the test."""
    logs = [folder / f"rank{rank}.log" for rank in range(number)]
    ranks = [
        RANKS.Process(target=run_script, args=(script, [str(folder), str(rank), str(number)], str(log)))
        for rank, log in enumerate(logs)
    ]
    for rank in ranks:
        rank.start()
    end_ranks(ranks, logs, 300)


def run_script(script: str, arguments: list[str], log: str) -> None:
    """What a rank does: `python script arguments`, with its output in the file `log`."""
    write_to(log)
    torch.set_num_threads(1)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def be_a_rank(run_rank: Callable[[Path, int], None]) -> None:
    """What such a script does: `run_rank(folder, rank)` of its arguments, and the end of the process."""
    run_rank(Path(sys.argv[1]), int(sys.argv[2]))
    # Not by return: gloo's threads live on, and one that drops a tensor while the interpreter shuts down ends
    # the process with "terminate called without an active exception" (seen once in CI, on a rank with nothing
    # to save).
    sys.stderr.flush()
    os._exit(0)
