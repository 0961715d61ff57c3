"""Chunks of whole sequences: rows whose gradients depend on each other, a pair for DPO, one row for KTO.

The gradient of a group of rows is known as soon as its own log-probabilities are. Groups that fit the
workspace share a chunk. A longer group takes n chunks, whose statistics are computed one after another. The
last chunk's logits then still exist, so its gradient comes at once; the n - 1 others are recomputed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .engine import Sequences
from .inputs import HeadInputs, NeedsGrad
from .plan import capacity


def group_chunks(inputs: HeadInputs, sequences: Sequences, needs: NeedsGrad) -> list[list[Tensor]]:
    """Token indices of chunks, ignored tokens left out, in lists: one chunk of several groups, or one group.

    A group's own chunks are even: a last chunk of a few tokens would run its GEMMs at a fraction of the
    speed.
    """
    room, _ = capacity(inputs.tile_call(needs)._replace(tail_eps=None))
    kept = (inputs.ids >= 0).nonzero()[:, 0]
    ends = torch.searchsorted(kept, sequences.cu_seqlens).tolist()
    shared: list[list[Tensor]] = []
    long: list[list[Tensor]] = []
    used = room
    for rows in sequences.groups:
        tokens = torch.cat([kept[ends[row] : ends[row + 1]] for row in rows])
        count = len(tokens)
        if count > room:
            long.append(list(tokens.tensor_split(-(-count // room))))
        elif count:
            if used + count > room:
                shared.append([])
                used = 0
            shared[-1].append(tokens)
            used += count
    return [[torch.cat(groups)] for groups in shared] + long
