"""Rows that the ranks drew, each of which travels to the ranks that learn from it and to no other."""

import pickle
from collections.abc import Sequence
from typing import TypeVar, overload

import torch
import torch.distributed as dist

from ..runs.distributed import World

Row = TypeVar("Row")


class SharedRows(Sequence[Row]):
    """The rows of all ranks, of which a rank holds those that it drew, a block, and those that it fetched."""

    def __init__(self, world: World, local: Sequence[Row], total: int) -> None:
        self.world, self.total = world, total
        self.drawn_by = [rank for rank in range(world.size) for _ in block(total, world.size, rank)]
        self.held = dict(zip(block(total, world.size, world.rank), local, strict=True))

    def __len__(self) -> int:
        return self.total

    @overload
    def __getitem__(self, key: int) -> Row: ...
    @overload
    def __getitem__(self, key: slice) -> list[Row]: ...
    def __getitem__(self, key: int | slice) -> Row | list[Row]:
        if isinstance(key, slice):
            return [self[number] for number in range(self.total)[key]]
        number = range(self.total)[key]
        if number not in self.held:
            raise LookupError(
                f"row {number}: got one that rank {self.drawn_by[number]} drew, expected one of rank "
                f"{self.world.rank}: fetch it first"
            )
        return self.held[number]

    def fetch(self, needed: Sequence[Sequence[int]]) -> None:
        """Bring the rows that each rank needs to it: two all-to-all collectives, of sizes and of bytes.

        needed: the rows' numbers for each rank, the same on all ranks, which all call it.
        """
        sent = []
        for rank, numbers in enumerate(needed):
            rows = {number: self.held[number] for number in numbers if self._sends(number, rank)}
            sent.append(pickle.dumps(rows) if rows else b"")
        sizes = torch.tensor([len(part) for part in sent], device=self.world.device)
        received_sizes = torch.empty_like(sizes)
        dist.all_to_all_single(received_sizes, sizes)
        content = torch.frombuffer(bytearray(b"".join(sent)) or bytearray(1), dtype=torch.uint8)
        content = content[: int(sizes.sum())].to(self.world.device)
        splits = received_sizes.tolist()
        received = torch.empty(sum(splits), dtype=torch.uint8, device=self.world.device)
        dist.all_to_all_single(received, content, splits, sizes.tolist())
        for part in received.cpu().split(splits):
            if len(part):
                self.held |= pickle.loads(part.numpy().tobytes())

    def _sends(self, number: int, rank: int) -> bool:
        return rank != self.world.rank and self.drawn_by[number] == self.world.rank


def block(total: int, ranks: int, rank: int) -> range:
    """The rows of `total` that a rank draws: blocks of about the same size."""
    return range(total * rank // ranks, total * (rank + 1) // ranks)
