"""The processes of one run: rank, device, sums over ranks. Without torchrun there is one process."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..models.sharding import Sharding
from .rank_watch import Watch

Value = TypeVar("Value")


@dataclass(frozen=True)
class World:
    """One process among those of the run."""

    rank: int
    size: int
    device: torch.device
    watch: Watch | None = None
    """Of the other ranks, where there are any."""
    sharding: Sharding | None = None
    """How models are sharded; None if each rank has whole ones."""

    @property
    def tp_size(self) -> int:
        """Ranks that share layers, and so train on the same rows."""
        return 1 if self.sharding is None else self.sharding.tp_size

    @property
    def dp_size(self) -> int:
        """Ranks, or groups of tp ranks, among which the rows are divided."""
        return self.size // self.tp_size

    @property
    def dp_rank(self) -> int:
        """The place of this rank, or of its tp group, among those."""
        return self.rank // self.tp_size

    @property
    def dp_group(self) -> dist.ProcessGroup | None:
        """This rank and those with other rows, each tp group once; None if all have the same rows."""
        if self.dp_size == 1:
            return None
        return dist.group.WORLD if self.sharding is None else self.sharding.dp_group or dist.group.WORLD

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def say(self, message: str) -> None:
        """Print on the main process."""
        if self.main:
            print(message, flush=True)

    def at_step(self, step: int) -> None:
        """Note the step that this rank is in, counted from 1, for what other ranks report of it."""
        if self.watch is not None:
            self.watch.at_step(step)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def count(self, number: int) -> int:
        """A number summed over the rows of all ranks; those of a tp group count once."""
        return number if self.dp_size == 1 else int(self.sum([torch.tensor(number)])[0])

    def on_main(self, compute: Callable[[], Value]) -> Value:
        """What `compute` gives: on each rank, or with models to be sharded on rank 0, for all ranks.

        Before they are sharded, rank 0 alone has their values (main_values.py).
        """
        if self.sharding is None:
            return compute()
        values = [compute() if self.main else None]
        dist.broadcast_object_list(values)
        return cast(Value, values[0])

    def max(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        if self.size == 1:
            return number
        largest = torch.tensor(number, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def sum(self, values: Sequence[Tensor]) -> list[float]:
        """Each scalar summed over the rows of all ranks, in fp64; those of a tp group count once.

        It waits for the device.
        """
        total = torch.stack([value.detach().to(self.device, torch.float64) for value in values])
        if self.dp_size > 1:
            dist.all_reduce(total, group=self.dp_group)
        return [float(value) for value in total.tolist()]

    def place(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with its tensors, and those of batches in it, on this device."""

        def placed(value: Any) -> Any:
            if isinstance(value, Mapping):
                return self.place(value)
            return value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value

        return {name: placed(value) for name, value in batch.items()}


@contextmanager
def join_world(device: str, timeout: float = 30.0) -> Iterator[World]:
    """Join the process group that torchrun's environment describes: nccl on CUDA, gloo on CPUs.

    `device` is auto, cpu or cuda. A fault of one rank ends all ranks, as does a rank that gives no sign of
    life for `timeout` minutes. It is reported once, with rank and step if it is not rank 0's (rank_watch.py).
    Raises ValueError if device is cuda and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got cuda, expected auto or cpu, because torch sees no CUDA device")
    cuda = device != "cpu" and torch.cuda.is_available()
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(local)
    joined = size > 1 and not dist.is_initialized()
    if joined:
        # Half a minute more, so that the watch, which knows the rank, reports first.
        limit = timedelta(minutes=timeout, seconds=30)
        dist.init_process_group("nccl" if cuda else "gloo", device_id=local if cuda else None, timeout=limit)
    watch = Watch(rank, size, minutes=timeout) if joined else None
    try:
        yield World(rank, size, local, watch)
    except BaseException as error:
        # The process group is left as it is: to leave it may mean to wait for a rank that is gone.
        cause = error if watch is None else watch.end(error)
        if cause is error:
            raise
        raise cause from error
    if watch is not None:
        watch.close()
        dist.destroy_process_group()
