"""Two ranks of which one fails, dies or stops: it is told once, with rank, step and its own error, and the
other ends too."""

import os
import re
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from fastalign.faults import FAULT
from tests.stages.ranks import RANKS, be_a_rank

SCRIPT = """
import os, signal, sys, time
from fastalign.faults import reporting
from fastalign.stages.runs.signals import Signals
from fastalign.stages.runs.distributed import join_world

def fail(rank, step):
    {fault}

with reporting("fastalign sft"):
    import torch
    with join_world("cpu", timeout={minutes}) as world, Signals(world):
        for step in range(1, 4):
            world.at_step(step)
            fail(world.rank, step)
            world.count(1)
print("through", flush=True)
"""


def torchrun(folder: Path) -> str:
    """Run the script under torchrun, which ends a rank as soon as the other one has failed: its stderr."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "--shutdown-timeout=3",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, str(folder / "script.py")], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode != 0
    return done.stderr


def forked(folder: Path) -> str:
    """Run it in forked ranks, each of which must end by itself: what they wrote."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = start_ranks(folder, store)
    for rank in ranks:
        rank.join(200)
    assert all(rank.exitcode not in (0, None) for rank in ranks)
    return "".join((folder / f"rank{number}.log").read_text() for number in range(2))


def start_ranks(folder: Path, store: TCPStore) -> list[BaseProcess]:
    """Forked ranks that run the script and write to rank0.log and rank1.log."""
    ranks: list[BaseProcess] = [
        RANKS.Process(
            target=run_script,
            args=(rank, store.port, str(folder / f"rank{rank}.log"), str(folder / "script.py")),
        )
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def run_script(rank: int, port: int, log: str, script: str) -> None:
    """What a forked rank does."""
    be_a_rank(rank, 2, port, log)
    runpy.run_path(script, run_name="__main__")


def told(shown: str) -> list[str]:
    """The ranks' own lines, without what torchrun adds to them."""
    lines = [
        line
        for line in shown.splitlines()
        if line.startswith(("fastalign", "Traceback", "ValueError", "RuntimeError"))
    ]
    torchruns = "Traceback (most recent call last):"
    return lines[: lines.index(torchruns)] if torchruns in lines else lines


@pytest.mark.parametrize(
    ("run", "fault", "line"),
    [
        (
            torchrun,
            "if rank == 1 and step == 2: raise ValueError('row 7 is odd')",
            r"fastalign: error: rank 1, step 2: ValueError: row 7 is odd.*",
        ),
        (
            forked,
            "if rank == 0 and step == 2: raise ValueError('row 7 is odd')",
            r"fastalign sft: error: .*row 7 is odd.*",
        ),
        (
            forked,
            "if step == 2: raise ValueError('row 7 is odd')",
            r"fastalign sft: error: ValueError: row 7 is odd.*",
        ),
        (
            forked,
            "if rank == 1 and step == 2: os.kill(os.getpid(), signal.SIGKILL)",
            r"fastalign sft: error: rank 1 \(step 2\): gives no sign of life.*",
        ),
        (
            torchrun,
            "if rank == 0 and step == 2: os.kill(os.getpid(), signal.SIGKILL)",
            r"fastalign sft: error: rank 0 \(step 2\): gives no sign of life.*",
        ),
    ],
    ids=["a rank", "rank 0", "all ranks", "killed", "rank 0 killed"],
)
def test_what_ends_one_rank_ends_all_and_is_told_once(
    run: Callable[[Path], str], fault: str, line: str, tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.format(fault=fault, minutes=30.0))
    began = time.monotonic()
    lines = told(run(tmp_path))
    assert len(lines) == 1 and re.fullmatch(line, lines[0]), lines
    assert time.monotonic() - began < 60


def test_a_rank_that_is_stopped_ends_the_others_after_the_timeout(tmp_path: Path) -> None:
    """Without torchrun, which waits half a minute for the stopped rank once the other one has ended."""
    fault = "if rank == 1 and step == 2: os.kill(os.getpid(), signal.SIGSTOP)"
    (tmp_path / "script.py").write_text(SCRIPT.format(fault=fault, minutes=0.1))
    began = time.monotonic()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    first, stopped = ranks = start_ranks(tmp_path, store)
    try:
        first.join(120)
        assert stopped.is_alive()
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    shown = (tmp_path / "rank0.log").read_text()
    assert first.exitcode == FAULT and shown.splitlines()[-1] == (
        "fastalign: error: rank 1 (step 2): gives no sign of life for 0.1 minutes (timeout): stopped, or "
        "the machine is gone"
    )
    assert 6 < time.monotonic() - began < 90
