"""The rows of the head's weight sharded over the ranks of a process group: each rank has some of the ids.

Every rank has all hidden states and ids, and computes the statistics of its own logits. One all-gather of
that table gives every rank the table of the whole row. It is merged in the order of the ranks, in fp64, so
all ranks have the same bits. With MAX, LOGSUM, LOGP, ENTROPY and MEAN_LOGP of softmax/rows.py, r a rank, V_r
its rows and

    rel_r = (MAX_r - max MAX) + LOGSUM_r,    log q_r = rel_r - LOGSUM,    LOGSUM = logsumexp_r rel_r,

q_r is the share of the softmax's mass that rank r has, and

    LOGP      = LOGP_owner + log q_owner         the owner: the rank that has the id
    ENTROPY   = sum_r q_r (ENTROPY_r - log q_r)
    MEAN_LOGP = sum_r (V_r / V) (MEAN_LOGP_r + log q_r)
    TOP1      = TOP1_owner, where MAX_owner is the row's.

The gradient kernel then takes a rank's own logits and the table of the whole row. The one-hot term belongs to
the owner alone, and V in the uniform term is the whole vocabulary. dW and the bias's gradient stay on their
rank. dX is a sum over the ranks: one all-reduce, which runs beside the last GEMM of dW.

Bytes that each rank sends, for N tokens that are not ignored (twice as many in fp64):

    statistics         24 N, 16 N for a loss that needs no entropy and no mean of log P; one all-gather for
                       each chunk of tokens on a CPU, one for all tokens on a GPU
    dX                 4 N H (all tokens), one all-reduce; none where hidden needs no gradient
    dU                 4 N r, one all-reduce, for a LoRA adapter of rank r whose B has the same rows as weight
    distillation       8 (K + 2) N for K ids of the teacher, one all-gather a chunk, in fp64; once more in
                       backward with reduction="none" and in fp16
    kept sets          8 M for M kept ids, one all-reduce, in fp64; then dX
    mean_logit         8 N, one all-reduce (linear_token_outputs)

Nothing of size N V or V H is sent. In mode general the backward pass sends dX alone. A reference model's pass
is a call of its own. Chunks are planned from the largest shard: all ranks must have the same ones, or they
wait for each other for ever.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..softmax.rows import Coefficient, Stat

# What is gathered of the table [7, C]; LSE is MAX + LOGSUM.
_SENT = (Stat.LOGP, Stat.MAX, Stat.LOGSUM, Stat.TOP1, Stat.ENTROPY, Stat.MEAN_LOGP)
_SENT_LEAN = _SENT[:4]


class Shards(NamedTuple):
    """How the rows of a weight are sharded over the ranks of a group."""

    rank: int  # of this process in the group
    reduces_hidden: bool  # False: the caller sums dX over the ranks, as DTensor does
    rows: tuple[int, ...]  # of each rank; a rank may have none

    @property
    def vocab_size(self) -> int:
        """The size V of the vocabulary of all ranks."""
        return sum(self.rows)

    @property
    def largest(self) -> int:
        """Rows of the largest shard."""
        return max(self.rows)

    @property
    def first(self) -> int:
        """The first id of this rank."""
        return sum(self.rows[: self.rank])

    def numbers(self) -> list[float]:
        """The shards as the last part of an op's `float[]`."""
        return [float(self.rank), float(self.reduces_hidden), *map(float, self.rows)]

    @classmethod
    def of(cls, numbers: list[float]) -> Shards | None:
        """The shards that `numbers` wrote; None if the list is empty."""
        if not numbers:
            return None
        rank, reduces_hidden, *rows = numbers
        return cls(int(rank), reduces_hidden > 0, tuple(int(number) for number in rows))

    def owned(self, ids: Tensor) -> Tensor:
        """Whether each id is one of this rank."""
        return (ids >= self.first) & (ids < self.first + self.rows[self.rank])

    def local_ids(self, ids: Tensor) -> Tensor:
        """Ids as this rank's rows: -1 where ignored, 0 where another rank owns them."""
        return torch.where(ids < 0, -1, torch.where(self.owned(ids), ids - self.first, 0))

    def local_coefficients(self, coefficients: Tensor, ids: Tensor) -> Tensor:
        """The gradient kernel's [4, C] for this rank's logits: the one-hot term is the owner's."""
        coefficients = coefficients.clone()
        coefficients[Coefficient.ONEHOT] *= self.owned(ids)
        return coefficients


def local_table(local_stats: Tensor, *, lean: bool) -> Tensor:
    """What a rank sends of its statistics [7, C]: [6, C], or [4, C] if `lean`."""
    return local_stats[list(_SENT_LEAN if lean else _SENT)]


def stats_of_no_rows(count: int, like: Tensor) -> Tensor:
    """The statistics [7, C] of a rank without rows: no mass."""
    stats = torch.zeros(len(Stat), count, dtype=like.dtype, device=like.device)
    stats[Stat.MAX] = -math.inf
    return stats


@functools.lru_cache(maxsize=64)
def _on_device(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a tensor, kept: making one on a GPU waits for it."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=dtype, device=device)


def owners(shards: Shards, ids: Tensor) -> Tensor:
    """The rank that owns each id; rank 0 for ids below 0."""
    ends = tuple(float(sum(shards.rows[: rank + 1])) for rank in range(len(shards.rows)))
    return torch.bucketize(ids, _on_device(ends, torch.int64, ids.device), right=True)


class Mass(NamedTuple):
    """The mass of softmax rows that are in parts."""

    row_max: Tensor  # [C]
    log_sum: Tensor  # [C], of exp(z - row_max)
    log_share: Tensor  # [R, C], of each part; -inf for a part without mass

    @classmethod
    def of(cls, row_max: Tensor, log_sum: Tensor) -> Mass:
        """The mass of R parts from their MAX and LOGSUM, [R, C] fp64; MAX is -inf for a part without mass."""
        whole_max = row_max.amax(0)
        relative = torch.where(row_max == -math.inf, -math.inf, (row_max - whole_max) + log_sum)
        whole_sum = torch.where(whole_max == -math.inf, math.nan, relative.logsumexp(0))
        return cls(whole_max, whole_sum, relative - whole_sum)


def merged_table(parts: Tensor, ids: Tensor, shards: Shards) -> Tensor:
    """The table [7, C] of whole rows from the `local_table`s of all ranks [R, 6 or 4, C] and ids [C].

    0 for ignored tokens.
    """
    wide = parts.double()
    of_rank = dict(zip(_SENT, wide.unbind(1)))
    mass = Mass.of(of_rank[Stat.MAX], of_rank[Stat.LOGSUM])
    owner = owners(shards, ids)[None]

    def of_owner(values: Tensor) -> Tensor:
        return values.gather(0, owner)[0]

    table = torch.zeros(len(Stat), ids.numel(), dtype=torch.float64, device=ids.device)
    table[Stat.LOGP] = of_owner(of_rank[Stat.LOGP] + mass.log_share)
    table[Stat.MAX], table[Stat.LOGSUM] = mass.row_max, mass.log_sum
    table[Stat.LSE] = mass.row_max + mass.log_sum
    table[Stat.TOP1] = of_owner(of_rank[Stat.TOP1] * (of_rank[Stat.MAX] == mass.row_max))
    if Stat.ENTROPY in of_rank:
        empty = of_rank[Stat.MAX] == -math.inf
        entropies = torch.where(empty, 0.0, of_rank[Stat.ENTROPY])
        finite = mass.log_share.clamp(min=-1e30)  # q of a part without mass is 0, and 0 * -inf is NaN
        table[Stat.ENTROPY] = (mass.log_share.exp() * (entropies - finite)).sum(0)
        sizes = tuple(number / shards.vocab_size for number in shards.rows)
        size = _on_device(sizes, torch.float64, ids.device)[:, None]
        means = torch.where(empty, -math.inf, of_rank[Stat.MEAN_LOGP] + mass.log_share)
        table[Stat.MEAN_LOGP] = torch.where(size == 0, 0.0, size * means).sum(0)
    return torch.where(ids >= 0, table, 0.0).to(parts.dtype)
