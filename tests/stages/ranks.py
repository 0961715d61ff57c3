"""Ranks of stages without torchrun: forks of one process that has imported torch and transformers.

torchrun starts three interpreters for each run, which takes ten seconds. The tests of `sft`, of PPO and of
the watch start it: a rank here ends without Python's clean-up, where a rank once hung.
"""

import importlib
import multiprocessing
import os
import runpy
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import TCPStore

RANKS = multiprocessing.get_context("forkserver")
RANKS.set_forkserver_preload(["tests.stages.ranks", "fastalign.stages.ppo", "fastalign.stages.kto"])

# The module of a stage, or another one with `main(arguments)`, and its arguments.
Job = tuple[str, list[str]]


def be_a_rank(rank: int, ranks: int, port: int, log: str) -> None:
    """Set torchrun's environment, and send the output to the file `log`."""
    write_to(log)
    os.environ |= {"OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def write_to(log: str) -> None:
    """Send the output of this process to a file."""
    number = os.open(log, os.O_CREAT | os.O_WRONLY)
    os.dup2(number, 1)
    os.dup2(number, 2)


def run_rank(rank: int, port: int, log: str, module: str, arguments: tuple[str, ...]) -> None:
    """What a rank does: `python -m module arguments`."""
    be_a_rank(rank, 2, port, log)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def run_jobs(rank: int, ranks: int, port: int, log: str, jobs: Sequence[Job]) -> None:
    """What a rank does that runs several stages one after the other in one process group."""
    be_a_rank(rank, ranks, port, log)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for module, arguments in jobs:
        importlib.import_module(module).main(arguments)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads live on (tests/two_ranks.py)


class Ranks:
    """Ranks under way, each with a log in `folder`."""

    def __init__(self, folder: Path, ranks: int, jobs: Sequence[Job]) -> None:
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.logs = [folder / f"rank{rank}.log" for rank in range(ranks)]
        self.processes: list[BaseProcess] = [
            RANKS.Process(target=run_jobs, args=(rank, ranks, self.store.port, str(log), jobs))
            for rank, log in enumerate(self.logs)
        ]
        for process in self.processes:
            process.start()

    def join(self, seconds: float = 120) -> None:
        """Wait for all; one that fails or hangs fails the test."""
        end_ranks(self.processes, self.logs, seconds)


def end_ranks(processes: Sequence[BaseProcess], logs: Sequence[Path], seconds: float = 120) -> None:
    """Wait for all processes; one that fails or hangs fails the test, with the ends of all logs."""
    for process in processes:
        process.join(timeout=seconds)
        if process.is_alive():
            process.kill()
            process.join()
    shown = "\n".join(log.read_text()[-3000:] for log in logs if log.exists())
    assert all(process.exitcode == 0 for process in processes), shown


def run_two_ranks(folder: Path, module: str, *arguments: str) -> None:
    """Run a stage in two processes; one that fails or hangs at its end fails the test."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    logs = [folder / f"rank{rank}.log" for rank in range(2)]
    ranks: list[BaseProcess] = [
        RANKS.Process(target=run_rank, args=(rank, store.port, str(logs[rank]), module, arguments))
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    end_ranks(ranks, logs)
