"""Two ranks of a stage without torchrun: forks of one process that has imported torch and transformers.

torchrun starts three interpreters for each run, which takes ten seconds. The tests of `sft`, of PPO and of
the watch start it: a rank here ends without Python's clean-up, where a rank once hung.
"""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

from torch.distributed import TCPStore

RANKS = multiprocessing.get_context("forkserver")
RANKS.set_forkserver_preload(["tests.stages.ranks", "fastalign.stages.ppo", "fastalign.stages.kto"])


def run_rank(rank: int, port: int, log: str, module: str, arguments: tuple[str, ...]) -> None:
    """What a rank does: `python -m module arguments` in torchrun's environment, its output in file `log`."""
    number = os.open(log, os.O_CREAT | os.O_WRONLY)
    os.dup2(number, 1)
    os.dup2(number, 2)
    os.environ |= {"OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def run_two_ranks(folder: Path, module: str, *arguments: str) -> None:
    """Run a stage in two processes; one that fails or hangs at its end fails the test."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    logs = [folder / f"rank{rank}.log" for rank in range(2)]
    ranks = [
        RANKS.Process(target=run_rank, args=(rank, store.port, str(logs[rank]), module, arguments))
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=120)
        if rank.is_alive():
            rank.kill()
    shown = "\n".join(log.read_text()[-3000:] for log in logs if log.exists())
    assert [rank.exitcode for rank in ranks] == [0, 0], shown
