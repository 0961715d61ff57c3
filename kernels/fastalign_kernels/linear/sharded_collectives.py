"""What ranks of a vocabulary-sharded head send each other. No other file of the head calls a collective.

The group is known by its name, as torch's functional collectives have it: an op takes a string, and no
process group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..softmax.rows import Stat
from .sharded import Mass, Shards, local_table, merged_table, owners


def _wait(x: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(x)


def all_gather(x: Tensor, ranks: int, group: str) -> Tensor:
    """x of all ranks, [R, *x.shape] in the order of the ranks."""
    if ranks == 1:
        return x[None]
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), ranks, group)
    return _wait(gathered).view(ranks, *x.shape)


class Ranks(NamedTuple):
    """The ranks over which a tensor is summed."""

    rows: int  # of the tensor that are written; -1: not known before `finish`
    number: int  # of ranks
    group: str


class RankSum:
    """A sum over the ranks, in place. It begins with the last row and runs beside what follows."""

    def __init__(self, x: Tensor, ranks: Ranks) -> None:
        """x: contiguous; not read or written between its last row and `finish`."""
        self.x, self.ranks = x, ranks
        self.missing = ranks.rows
        self.started = ranks.number == 1 or x.numel() == 0
        self.sends = not self.started

    def add_rows(self, rows: int) -> None:
        """Count rows that are complete; start the sum with the last."""
        self.missing -= rows
        if self.missing == 0:
            self.start()

    def start(self) -> None:
        """Start the sum over ranks: all rows are complete."""
        if not self.started:
            torch.ops._c10d_functional.all_reduce_(self.x, "sum", self.ranks.group)
            self.started = True

    def finish(self) -> Tensor:
        """Wait for the sum over the ranks, and return it."""
        self.start()
        return _wait(self.x) if self.sends else self.x


def whole_stats(local_stats: Tensor, ids: Tensor, shards: Shards, group: str, *, lean: bool) -> Tensor:
    """The statistics [7, C] of whole rows, from those of this rank's logits.

    ids: [C], of the whole vocabulary. lean: ENTROPY and MEAN_LOGP are not used, and 0.
    """
    parts = all_gather(local_table(local_stats, lean=lean), len(shards.rows), group)
    return merged_table(parts, ids, shards)


def whole_outcomes(raw: Tensor, ids: Tensor, tail: Tensor, shards: Shards, group: str) -> Tensor:
    """The logits [C, K] of outcomes, each from the rank that has it; `tail` becomes that of whole rows.

    raw: [C, K] fp64, read where this rank has the id. ids: [C, K], of the whole vocabulary. tail: the
    statistics [7, C] of all other logits of this rank, of which MAX and LOGSUM are merged.
    """
    of_tail = tail[[Stat.MAX, Stat.LOGSUM]].double()
    parts = all_gather(torch.cat([raw.t(), of_tail]), len(shards.rows), group)
    mass = Mass.of(parts[:, -2], parts[:, -1])
    tail[Stat.MAX], tail[Stat.LOGSUM] = mass.row_max, mass.log_sum
    return parts[:, :-2].gather(0, owners(shards, ids).t()[None])[0].t()


def sum_of_ranks(x: Tensor, ranks: int, group: str) -> Tensor:
    """The sum of a contiguous x over the ranks, in place. Where one rank has a number and the others 0, it is
    that number, exactly."""
    return RankSum(x, Ranks(-1, ranks, group)).finish()
