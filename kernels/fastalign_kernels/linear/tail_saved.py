"""With a tail (linear/tail_columns.py), a forward pass keeps what the backward pass needs, where the exact way makes the
logits again.

For any upstream gradient that is 1 + 2 f GEMMs in place of 4. The kept columns' logits take f of all logits;
what does not fit, together with a chunk's logits, twice the workspace is made again: 2 + 2 f GEMMs for these
tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..softmax.rows import accumulator_dtype
from .accumulate import Block, Gradients, GradientSums
from .plan import TOKENS, capacity, keeping_bytes
from .tail_columns import DENSE, Kept
from .token_tiles import ChunkCoefficients, Head, add_all, chunk_blocks, new_table, no_autocast, tail_blocks

MADE_AGAIN = -1  # in place of a number of columns


class KeptState(NamedTuple):
    """Tensors of sizes that are known beforehand, so that they can be a compiled op's outputs; blocks lie one
    after another."""

    logits: Tensor  # [E], of each block [C, K]
    columns: Tensor  # [M] int64
    others: Tensor  # [blocks, V]
    totals: Tensor  # [2, N] fp64
    order: Tensor  # [N] int64, the blocks' token indices
    sizes: Tensor  # [blocks, 2] int64 on the CPU: C and K, or MADE_AGAIN; C is 0 beyond the last block


def empty_state(head: Head, wanted: tuple[bool, bool, bool]) -> KeptState:
    """Room for what `sweep_keeping` keeps; `wanted` as there."""
    hidden, weight, *_ = head
    N, V = hidden.shape[0], weight.shape[0]
    kind, dtype = hidden.device.type, accumulator_dtype(hidden.dtype)
    weight_grad = wanted[1] or wanted[2]
    chunk, per_token = capacity(
        V, hidden.dtype, kind, wanted[0], weight_grad, head.tail_eps, head.workspace_mib
    )
    blocks = -(-N // chunk) * -(-chunk // TOKENS["cpu" if kind == "cpu" else "cuda"])
    most = int(DENSE * V)
    room = keeping_bytes(kind, weight_grad, head.workspace_mib, chunk * per_token)
    return KeptState(
        hidden.new_empty(min(room // dtype.itemsize, N * most), dtype=dtype),
        hidden.new_empty(blocks * most, dtype=torch.int64),
        hidden.new_empty(blocks, V, dtype=dtype),
        hidden.new_empty(2, N, dtype=torch.float64),
        hidden.new_empty(N, dtype=torch.int64),
        torch.zeros(blocks, 2, dtype=torch.int64),
    )


def sweep_keeping(head: Head, wanted: tuple[bool, bool, bool]) -> tuple[Tensor, KeptState]:
    """The table [7, N] and what the tail keeps. `wanted`: the gradients of hidden, weight and bias that
    `sweep_kept` will be asked for."""
    with no_autocast(head):
        sums = GradientSums(head.hidden, head.weight, head.bias, head.transform, (False, False, False))
        table = new_table(head)
        state = empty_state(head, wanted)
        token = value = column = 0
        for b, (block, kept) in enumerate(
            tail_blocks(head, sums, chunk_blocks(head, sums, table, True, None, wanted))
        ):
            C, K = block.ids.numel(), MADE_AGAIN
            own = block.tokens
            state.order[token : token + C] = (
                torch.arange(own.start, own.stop) if isinstance(own, slice) else own
            )
            if kept is not None and value + C * kept.columns.numel() <= state.logits.numel():
                K = kept.columns.numel()
                torch.index_select(
                    kept.logits, 1, kept.columns, out=state.logits[value : value + C * K].view(C, K)
                )
                state.totals[:, token : token + C] = kept.totals
                state.columns[column : column + K] = kept.columns
                state.others[b] = kept.others
                value, column = value + C * K, column + K
            state.sizes[b, 0], state.sizes[b, 1] = C, K
            token += C
    return table, state


def _kept_blocks(state: KeptState) -> Iterator[tuple[Tensor, Kept | None]]:
    token = value = column = 0
    for b, (C, K) in enumerate(state.sizes.tolist()):
        index = state.order[token : token + C]
        if K == MADE_AGAIN:
            yield index, None
        elif C:
            columns = state.columns[column : column + K]
            logits = state.logits[value : value + C * K].view(C, K)
            yield index, Kept(columns, logits, state.totals[:, token : token + C], state.others[b])
            value, column = value + C * K, column + K
        token += C


def sweep_kept(
    head: Head,
    table: Tensor,
    state: KeptState,
    chunk_coefficients: ChunkCoefficients,
    wanted: tuple[bool, bool, bool],
) -> Gradients:
    """Gradients from what `sweep_keeping` kept, and from logits made again where it did not."""
    with no_autocast(head):
        sums = GradientSums(head.hidden, head.weight, head.bias, head.transform, wanted)
        again = []
        for index, kept in _kept_blocks(state):
            if kept is None:
                again.append([index])
                continue
            stats = table[:, index]
            x = head.hidden[index].to(sums.compute)
            sums.add_kept(
                Block(index, head.ids[index], x, stats, kept.logits, chunk_coefficients(stats, index)), kept
            )
        rest = chunk_blocks(head, sums, table, False, again, wanted) if again else ()
        add_all(
            head,
            sums,
            (block._replace(coefficients=chunk_coefficients(block.stats, block.tokens)) for block in rest),
        )
        return sums.finish()
