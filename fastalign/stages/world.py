"""The processes of one run: rank, device, sums over ranks. Without torchrun it is a world of one."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def say(self, message: str) -> None:
        """Print on the main process."""
        if self.main:
            print(message, flush=True)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def count(self, number: int) -> int:
        """A number summed over the ranks."""
        return number if self.size == 1 else int(self.sum([torch.tensor(number)])[0])

    def sum(self, values: Sequence[Tensor]) -> list[float]:
        """Each scalar summed over the ranks, in fp64; waits for the device."""
        total = torch.stack([value.detach().to(self.device, torch.float64) for value in values])
        if self.size > 1:
            dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def place(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with its tensors, and those of batches in it, on this device."""

        def placed(value: Any) -> Any:
            if isinstance(value, Mapping):
                return self.place(value)
            return value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value

        return {name: placed(value) for name, value in batch.items()}


@contextmanager
def join_world(device: str) -> Iterator[World]:
    """Join the process group that torchrun's environment describes: nccl on CUDA, gloo on CPUs.

    `device` is auto, cpu or cuda. Raises ValueError where cuda is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda was asked for, and torch sees no CUDA device; allowed here: auto, cpu")
    cuda = device != "cpu" and torch.cuda.is_available()
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(local)
    joined = size > 1 and not dist.is_initialized()
    if joined:
        dist.init_process_group("nccl" if cuda else "gloo", device_id=local if cuda else None)
    try:
        yield World(rank, size, local)
    finally:
        if joined:
            dist.destroy_process_group()
