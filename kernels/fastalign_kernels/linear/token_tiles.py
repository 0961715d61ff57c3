"""The loop that every head call runs: chunks of tokens (linear/plan.py), their logits by one GEMM, statistics,
gradients (linear/accumulate.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..gemm import mm
from ..softmax.rows import Stat, Transform, accumulator_dtype, row_stats
from .accumulate import Block, Gradients, GradientSums
from .plan import TOKENS, HeadPlan, plan_head
from .tail_columns import Choice, Kept, choose, first_true, keep

ChunkCoefficients = Callable[
    [Tensor, Tensor | slice], Tensor
]  # statistics [7, C] of a chunk, its token indices -> row_grad's [4, C]


class Head(NamedTuple):
    """The arguments every head op shares; ids are -1 where ignored."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H], hidden's dtype or fp32
    ids: Tensor  # [N]
    bias: Tensor | None  # [V]
    transform: Transform
    workspace_mib: float | None
    tail_eps: float | None = None  # None: exact

    def plan(self, n_tokens: int, hidden_grad: bool, weight_grad: bool) -> HeadPlan:
        V, H = self.weight.shape
        return plan_head(
            n_tokens,
            H,
            V,
            dtype=self.hidden.dtype,
            device=self.hidden.device,
            hidden_grad=hidden_grad,
            weight_grad=weight_grad,
            tail_eps=self.tail_eps,
            workspace_mib=self.workspace_mib,
        )


def _kept_tokens(ids: Tensor) -> tuple[Tensor | None, Callable[[], int]]:
    """Indices [N] with the kept tokens first (None: all are kept), and a function that tells how many are
    kept.

    On a GPU only the second chunk asks: the host waits for work that was queued before the first chunk, the
    device never idles. Under graph capture nothing can be asked, so all tokens run, the ignored ones with
    zero coefficients.
    """
    if capturing(ids):
        return None, ids.numel
    order, how_many = first_true(ids >= 0)
    return (None if not ids.is_cuda and how_many() == ids.numel() else order), how_many


def capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _chunks(ids: Tensor, plan: Callable[[int], HeadPlan]) -> Iterator[Tensor | slice]:
    """Token indices of each chunk, kept tokens only (on a GPU the first chunk may hold ignored ones)."""
    order, how_many = _kept_tokens(ids)
    N = ids.numel() if ids.is_cuda else how_many()
    chunk = plan(N).chunk
    for begin in range(0, N, chunk):
        if begin and ids.is_cuda:
            N = how_many()
            if begin >= N:
                return
        end = min(begin + chunk, N)
        yield slice(begin, end) if order is None else order[begin:end]


def no_autocast(head: Head) -> torch.autocast:
    """Dtypes are chosen here: autocast would cast some of the GEMMs again."""
    return torch.autocast(head.hidden.device.type, enabled=False)


def new_table(head: Head) -> Tensor:
    """The statistics [7, N] before any is made: those of ignored tokens stay 0."""
    return torch.zeros(
        len(Stat), head.hidden.shape[0], dtype=accumulator_dtype(head.hidden.dtype), device=head.hidden.device
    )


def chunk_blocks(
    head: Head,
    sums: GradientSums,
    table: Tensor,
    new: bool,
    groups: Sequence[Sequence[Tensor]] | None,
    wanted: tuple[bool, ...],
) -> Iterator[Block]:
    """Logits of each chunk and its statistics, which go to the table if that is new. They live until the next
    chunk.

    `groups`: token indices of chunks, instead of the plan's, each of which is a group of its own. With a new
    table a group's blocks come when the statistics of all its chunks are there: the last chunk's first, whose
    logits are in memory, then the others', made again.

    With a tail on a GPU they live until the chunk after the next: see `tail_blocks`.
    """
    hidden, _, ids, _, transform, *_ = head
    tiles: list[Tensor] = []

    def make(index: Tensor | slice, new: bool) -> Block:
        y = ids[index]
        x = hidden[index].to(sums.compute)
        # ignored tokens of the first chunk: their gradient is 0, but 0 times a NaN hidden state would reach
        # dW
        if ids.is_cuda:
            x = x.masked_fill((y < 0)[:, None], 0)
        if not tiles:
            rows = (
                y.numel() if groups is None else max(len(own) for group in groups for own in group)
            )  # the plan's first is its largest
            shape = (rows, sums.w.shape[0])
            number = 2 if head.tail_eps is not None and ids.is_cuda else 1
            tiles.extend(
                torch.empty(shape, dtype=sums.accumulator, device=hidden.device) for _ in range(number)
            )
        tiles.append(tiles.pop(0))
        logits = tiles[-1][: y.numel()]
        mm(x, sums.w.t(), logits)
        if new:
            table[:, index] = row_stats(logits[None], y, sums.bias, transform)
        return Block(index, y, x, table[:, index].contiguous(), logits)

    planned = ([index] for index in _chunks(ids, lambda n: head.plan(n, wanted[0], wanted[1] or wanted[2])))
    for *others, last in planned if groups is None else groups:
        for index in others:
            make(index, new)
        yield make(last, new)
        for index in others:
            yield make(index, False)


def tail_blocks(
    head: Head, sums: GradientSums, blocks: Iterable[Block]
) -> Iterator[tuple[Block, Kept | None]]:
    """Blocks of at most so many TOKENS with their kept columns, None where the block had better be dense.

    On a GPU the number of kept columns, which sizes the GEMMs, is asked for when the next chunk's logits are
    queued, so that the device has work while the host waits.
    """
    eps = head.tail_eps
    assert eps is not None
    queued: list[tuple[Block, Choice]] = []

    def finished() -> Iterator[tuple[Block, Kept | None]]:
        for part, choice in queued:
            yield part, keep(choice, part.logits)

    for block in blocks:
        C, most = block.ids.numel(), TOKENS[head.hidden.device.type]
        parts = [block.part(begin, min(begin + most, C)) for begin in range(0, C, most)]
        chosen = [(p, choose(p.logits, p.ids, sums.bias, head.transform, p.stats, eps)) for p in parts]
        if head.ids.is_cuda:
            yield from finished()
            queued = chosen
        else:
            queued = chosen
            yield from finished()
            queued = []
    yield from finished()


def sweep(
    head: Head,
    table: Tensor | None,
    chunk_coefficients: ChunkCoefficients | None,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Gradients]:
    """The loop over chunks: logits by one GEMM, statistics (unless `table` has them), gradient in place, a
    GEMM each for dX and dW.

    `chunk_coefficients(table of the chunk [7, C], its token indices)` gives row_grad's [4, C]; None:
    statistics only. `wanted`: gradients of hidden, weight and bias. With head.tail_eps the backward GEMMs
    take the columns that linear/tail_columns.py keeps (under graph capture, where their number cannot be known, all of
    them).
    """
    with no_autocast(head):
        sums = GradientSums(head.hidden, head.weight, head.bias, head.transform, wanted)
        new = table is None
        if table is None:
            table = new_table(head)
        blocks = chunk_blocks(head, sums, table, new, None, wanted)
        if chunk_coefficients is None:
            for _ in blocks:
                pass
        else:
            add_all(
                head, sums, (b._replace(coefficients=chunk_coefficients(b.stats, b.tokens)) for b in blocks)
            )
        return table, sums.finish()


def add_all(head: Head, sums: GradientSums, blocks: Iterable[Block]) -> None:
    if head.tail_eps is None or capturing(head.ids):
        for block in blocks:
            sums.add(block)
        return
    for block, kept in tail_blocks(head, sums, blocks):
        if kept is None:
            sums.add(block)
        else:
            sums.add_kept(block, kept)
