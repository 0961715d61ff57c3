"""What a forward pass with a tail saves for any upstream gradient, where exact gradients recompute logits.

That costs 1 + 2 f GEMMs in place of 4, f the share of columns kept (tail_columns.py). The kept columns'
logits take f of all logits. With a chunk's logits they may take twice the workspace. The tokens that do not
fit are recomputed: 2 + 2 f GEMMs for these.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..softmax.rows import accumulator_dtype
from .accumulate import GradAccumulator
from .chunks import Operands, TokenChunk
from .inputs import HeadInputs, NeedsGrad
from .plan import TOKENS, capacity, kept_columns_bytes
from .tail_columns import DENSE, KeptColumns, chunks_with_columns

RECOMPUTE = -1  # in place of a number of columns


class SavedColumns(NamedTuple):
    """Tensors of sizes known beforehand, as a compiled op's outputs must be; chunks lie one after another."""

    logits: Tensor  # [E], of each chunk [C, K]
    columns: Tensor  # [M] int64
    dropped_sums: Tensor  # [chunks, V]
    totals: Tensor  # [2, N] fp64
    order: Tensor  # [N] int64, the chunks' token indices
    sizes: Tensor  # [chunks, 2] int64 on the CPU: C and K, or RECOMPUTE; C is 0 beyond the last chunk


def empty_saved_columns(inputs: HeadInputs, needs: NeedsGrad) -> SavedColumns:
    """Room for what `save_columns` saves."""
    hidden, call = inputs.hidden, inputs.tile_call(needs)
    N, V = hidden.shape[0], inputs.weight.shape[0]
    device_type, dtype = hidden.device.type, accumulator_dtype(hidden.dtype)
    chunk, per_token = capacity(call)
    chunks = -(-N // chunk) * -(-chunk // TOKENS["cpu" if device_type == "cpu" else "cuda"])
    most = int(DENSE * V)
    # beside as many logits as without a screen, so that its codes have room
    logits_bytes = max(chunk, capacity(call._replace(screen=False))[0]) * per_token
    room = kept_columns_bytes(call, logits_bytes)
    return SavedColumns(
        hidden.new_empty(min(room // dtype.itemsize, N * most), dtype=dtype),
        hidden.new_empty(chunks * most, dtype=torch.int64),
        hidden.new_empty(chunks, V, dtype=dtype),
        hidden.new_empty(2, N, dtype=torch.float64),
        hidden.new_empty(N, dtype=torch.int64),
        torch.zeros(chunks, 2, dtype=torch.int64),
    )


def save_columns(
    inputs: HeadInputs, operands: Operands, chunks: Iterable[TokenChunk], needs: NeedsGrad
) -> SavedColumns:
    """The kept columns of the chunks, as many as fit."""
    saved = empty_saved_columns(inputs, needs)
    token = value = column = 0
    for number, (part, _, kept) in enumerate(chunks_with_columns(inputs, operands, chunks)):
        C, K = part.ids.numel(), RECOMPUTE
        tokens = part.tokens
        if isinstance(tokens, slice):
            tokens = torch.arange(tokens.start, tokens.stop)
        saved.order[token : token + C] = tokens
        if kept is not None and value + C * kept.columns.numel() <= saved.logits.numel():
            K = kept.columns.numel()
            room = saved.logits[value : value + C * K].view(C, K)
            torch.index_select(kept.logits, 1, kept.columns, out=room)
            saved.totals[:, token : token + C] = kept.totals
            saved.columns[column : column + K] = kept.columns
            saved.dropped_sums[number] = kept.dropped_sums
            value, column = value + C * K, column + K
        saved.sizes[number, 0], saved.sizes[number, 1] = C, K
        token += C
    return saved


def _saved_chunks(saved: SavedColumns) -> Iterator[tuple[Tensor, KeptColumns | None]]:
    """Token indices of each chunk and its columns; None where they did not fit."""
    token = value = column = 0
    for number, (C, K) in enumerate(saved.sizes.tolist()):
        tokens = saved.order[token : token + C]
        if K == RECOMPUTE:
            yield tokens, None
        elif C:
            columns = saved.columns[column : column + K]
            logits = saved.logits[value : value + C * K].view(C, K)
            totals = saved.totals[:, token : token + C]
            yield tokens, KeptColumns(columns, logits, totals, saved.dropped_sums[number])
            value, column = value + C * K, column + K
        token += C


def add_saved(
    inputs: HeadInputs, sums: GradAccumulator, stats: Tensor, saved: SavedColumns, coefficients: Tensor
) -> list[Tensor]:
    """Add the gradients of the chunks that were saved; the token indices of those to recompute."""
    recompute = []
    for tokens, kept in _saved_chunks(saved):
        if kept is None:
            recompute.append(tokens)
            continue
        states = sums.operands.states(inputs, tokens)
        ids = inputs.local_ids(inputs.ids[tokens])
        chunk = TokenChunk(tokens, ids, states, stats[:, tokens], kept.logits)
        sums.add_kept(chunk, coefficients[:, tokens].contiguous(), kept)
    return recompute
