"""Two ranks of which one fails, dies or stops: it is told once, with rank, step and its own error, and the
other ends too."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from fastalign.faults import FAULT

SCRIPT = """
import os, signal, sys, time
from fastalign.faults import reporting
from fastalign.stages.signals import Signals
from fastalign.stages.distributed import join_world

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


def run(folder: Path, fault: str, minutes: float = 30.0) -> tuple[int, list[str], float]:
    """Status, the ranks' own lines on stderr, and the seconds that it took."""
    (folder / "script.py").write_text(SCRIPT.format(fault=fault, minutes=minutes))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "--shutdown-timeout=3",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    began = time.monotonic()
    done = subprocess.run(
        [*command, str(folder / "script.py")], env=environment, capture_output=True, text=True, timeout=200
    )
    lines = [
        line
        for line in done.stderr.splitlines()
        if line.startswith(("fastalign", "Traceback", "ValueError", "RuntimeError"))
    ]
    lines = (
        lines[: lines.index("Traceback (most recent call last):")]
        if "Traceback (most recent call last):" in lines
        else lines
    )  # torchrun's own
    return done.returncode, lines, time.monotonic() - began


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (
            "if rank == 1 and step == 2: raise ValueError('row 7 is odd')",
            r"fastalign: error: rank 1, step 2: ValueError: row 7 is odd.*",
        ),
        (
            "if rank == 0 and step == 2: raise ValueError('row 7 is odd')",
            r"fastalign sft: error: .*row 7 is odd.*",
        ),
        (
            "if step == 2: raise ValueError('row 7 is odd')",
            r"fastalign sft: error: ValueError: row 7 is odd.*",
        ),
        (
            "if rank == 1 and step == 2: os.kill(os.getpid(), signal.SIGKILL)",
            r"fastalign sft: error: rank 1 \(step 2\): gives no sign of life.*",
        ),
        (
            "if rank == 0 and step == 2: os.kill(os.getpid(), signal.SIGKILL)",
            r"fastalign sft: error: rank 0 \(step 2\): gives no sign of life.*",
        ),
    ],
    ids=["a rank", "rank 0", "all ranks", "killed", "rank 0 killed"],
)
def test_what_ends_one_rank_ends_all_and_is_told_once(fault: str, line: str, tmp_path: Path) -> None:
    status, lines, seconds = run(tmp_path, fault)
    assert status != 0 and len(lines) == 1 and re.fullmatch(line, lines[0]), lines
    assert seconds < 60


def test_a_rank_that_is_stopped_ends_the_others_after_the_timeout(tmp_path: Path) -> None:
    """Without torchrun, which waits half a minute for the stopped rank once the other one has ended."""
    fault = "if rank == 1 and step == 2: os.kill(os.getpid(), signal.SIGSTOP)"
    (tmp_path / "script.py").write_text(SCRIPT.format(fault=fault, minutes=0.1))
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "WORLD_SIZE": "2"}
    shared |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    began = time.monotonic()
    first, stopped = (
        subprocess.Popen(
            [sys.executable, str(tmp_path / "script.py")],
            env=os.environ | shared | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    )
    try:
        shown = first.communicate(timeout=120)[1]
        assert stopped.poll() is None
    finally:
        stopped.kill()
        stopped.communicate()
    assert first.returncode == FAULT and shown.splitlines()[-1] == (
        "fastalign: error: rank 1 (step 2): gives no sign of life for 0.1 minutes (timeout): stopped, or "
        "the machine is gone"
    )
    assert 6 < time.monotonic() - began < 90
