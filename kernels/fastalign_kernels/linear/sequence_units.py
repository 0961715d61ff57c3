"""Losses of whole sequences a unit at a time: the rows whose gradients hang together, a pair for DPO, a row
for KTO.

A unit's gradient is known as soon as its own log-probabilities are. Units that fit the workspace share a
chunk. A unit of n chunks has its statistics made one chunk after another; the last chunk's logits are then
still there, so its gradient comes at once, and the logits of the n - 1 others are made again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .accumulate import Gradients, GradientSums
from .plan import capacity
from .token_tiles import Head, add_all, chunk_blocks, new_table, no_autocast

UnitCoefficients = Callable[
    [Tensor, Tensor, Tensor | slice], Tensor
]  # the table [7, N], a chunk's statistics and indices -> [4, C]


def unit_chunks(
    head: Head, cu_seqlens: Sequence[int], units: Sequence[tuple[int, ...]], wanted: tuple[bool, bool, bool]
) -> list[list[Tensor]]:
    """Kept tokens' indices, as groups of chunks: one of as many units (tuples of rows) as fit the workspace
    together, or those of one unit.

    A unit's own chunks are even: a last sliver of a few tokens would run its GEMMs at a fraction of the
    speed.
    """
    room, _ = capacity(
        head.weight.shape[0],
        head.hidden.dtype,
        "cpu",
        wanted[0],
        wanted[1] or wanted[2],
        None,
        head.workspace_mib,
    )
    kept = (head.ids >= 0).nonzero()[:, 0]
    ends = torch.searchsorted(kept, torch.tensor(cu_seqlens)).tolist()
    shared: list[list[Tensor]] = []
    long: list[list[Tensor]] = []
    used = room
    for rows in units:
        own = torch.cat([kept[ends[row] : ends[row + 1]] for row in rows])
        tokens = len(own)
        if tokens > room:
            long.append(list(own.tensor_split(-(-tokens // room))))
        elif tokens:
            if used + tokens > room:
                shared.append([])
                used = 0
            shared[-1].append(own)
            used += tokens
    return [[torch.cat(own)] for own in shared] + long


def sweep_units(
    head: Head,
    groups: Sequence[Sequence[Tensor]],
    unit_coefficients: UnitCoefficients,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Gradients]:
    """The table [7, N] and the gradients that are `wanted` of hidden, weight and bias, over the groups of
    `unit_chunks`.

    `unit_coefficients(table, statistics of the chunk [7, C], its token indices)` gives row_grad's [4, C]; at
    that time the table has the chunk's units whole, and of other units nothing or all.
    """
    with no_autocast(head):
        sums = GradientSums(head.hidden, head.weight, head.bias, head.transform, wanted)
        table = new_table(head)
        blocks = chunk_blocks(head, sums, table, True, groups, wanted)
        add_all(
            head, sums, (b._replace(coefficients=unit_coefficients(table, b.stats, b.tokens)) for b in blocks)
        )
        return table, sums.finish()
