"""Chunks of tokens: which tokens go together, and their logits and statistics, one GEMM a chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..gemm import mm, uses_native_gemm
from ..softmax.rows import Stat, accumulator_dtype, row_stats
from .inputs import HeadInputs, NeedsGrad
from .plan import CODED_TOKENS, token_chunk
from .screen import Screen
from .sharded import stats_of_no_rows
from .sharded_collectives import whole_stats


class Operands(NamedTuple):
    """The head in the dtypes of its GEMMs.

    GEMMs take hidden states and weight in hidden's dtype. On a CPU without our own GEMMs torch's would round
    their output to that dtype, so a chunk's hidden states and, once, the weight are widened. A LoRA adapter
    keeps fp32 where our own GEMMs take it.
    """

    weight: Tensor  # [V, H] of `factor`
    bias: Tensor | None  # [V] of `accumulator`
    factor: torch.dtype  # of hidden states and weight in a GEMM
    accumulator: torch.dtype  # of logits, statistics and sums
    grad: torch.dtype  # of dlogits and of a chunk's dX; our own GEMMs round dlogits while they pack
    lora_weight: Tensor | None  # [V, r]
    native: bool  # our own GEMMs run, which mix dtypes and gather rows at no cost

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """The right factor of each product of the logits: W, and B of a LoRA adapter."""
        return (self.weight,) if self.lora_weight is None else (self.weight, self.lora_weight)

    @classmethod
    def of(cls, inputs: HeadInputs) -> Operands:
        hidden, bias, lora = inputs.hidden, inputs.bias, inputs.lora
        accumulator = accumulator_dtype(hidden.dtype)
        native = uses_native_gemm(hidden.device, hidden.dtype)
        widen = not hidden.is_cuda and not native
        factor = accumulator if widen else hidden.dtype
        return cls(
            inputs.weight.to(hidden.dtype).to(factor),  # master weights are rounded here as on any machine
            None if bias is None else bias.to(accumulator),
            factor,
            accumulator,
            grad=factor if hidden.is_cuda else accumulator,
            lora_weight=None if lora is None else lora.weight if native else lora.weight.to(factor),
            native=native,
        )

    def states(self, inputs: HeadInputs, tokens: Tensor | slice) -> tuple[Tensor, ...]:
        """The left factors of some tokens: hidden states, and U of a LoRA adapter."""
        hidden = inputs.hidden[tokens].to(self.factor)
        if hidden.is_cuda:  # an ignored token's gradient is 0, but 0 times a NaN hidden state would reach dW
            hidden = hidden.masked_fill((inputs.ids[tokens] < 0)[:, None], 0)
        if inputs.lora is None or self.lora_weight is None:
            return (hidden,)
        thin = inputs.lora.hidden[tokens]
        return hidden, thin if self.native else thin.to(self.factor)


class TokenChunk(NamedTuple):
    """Tokens whose logits, or their kept columns, are in memory."""

    tokens: Tensor | slice  # their indices
    ids: Tensor  # [C], rows of the weight: 0 where another rank has the id's
    states: tuple[Tensor, ...]  # [C, H], and [C, r] with a LoRA adapter, as they enter a GEMM
    stats: Tensor  # [7, C]
    logits: Tensor  # [C, V]

    def part(self, begin: int, end: int) -> TokenChunk:
        tokens = self.tokens
        if isinstance(tokens, slice):
            tokens = slice(tokens.start + begin, tokens.start + end)
        else:
            tokens = tokens[begin:end]
        return TokenChunk(
            tokens,
            self.ids[begin:end],
            tuple(x[begin:end] for x in self.states),
            self.stats[:, begin:end].contiguous(),
            self.logits[begin:end],
        )


def new_stats(inputs: HeadInputs) -> Tensor:
    """The table [7, N] before any token runs. The statistics of ignored tokens stay 0."""
    hidden = inputs.hidden
    return hidden.new_zeros(len(Stat), hidden.shape[0], dtype=accumulator_dtype(hidden.dtype))


def capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured; the host then cannot wait for the device."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def on_host(numbers: Tensor) -> Callable[[], list[int]]:
    """A function that returns the numbers [n].

    On a GPU they are copied to pinned memory, and the function waits for no more than what was queued before
    this call.
    """
    if not numbers.is_cuda:
        return numbers.tolist
    memory = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    memory.copy_(numbers, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def when_copied() -> list[int]:
        copied.synchronize()
        return memory.tolist()

    return when_copied


def first_true(mask: Tensor) -> tuple[Tensor, Callable[[], int]]:
    """The indices of True first, in order, and a function that returns how many they are.

    On a CPU there are no other indices.
    """
    if not mask.is_cuda:
        index = mask.nonzero()[:, 0]
        return index, index.numel
    order, counted = torch.argsort(~mask, stable=True), on_host(mask.sum().view(1))
    return order, lambda: counted()[0]


def _kept_tokens(ids: Tensor) -> tuple[Tensor | None, Callable[[], int]]:
    """Indices [N] with the kept tokens first (None: all are kept), and a function that returns how many.

    On a GPU only the second chunk asks. The host then waits for work that was queued before the first chunk,
    and the device never idles. Under graph capture nothing can be asked: all tokens run, the ignored ones
    with coefficients of zero.
    """
    if capturing(ids):
        return None, ids.numel
    order, how_many = first_true(ids >= 0)
    return (None if not ids.is_cuda and how_many() == ids.numel() else order), how_many


def planned_chunks(inputs: HeadInputs, needs: NeedsGrad) -> Iterator[Tensor | slice]:
    """Token indices of the plan's chunks, ignored tokens left out (on a GPU the first may hold some)."""
    ids = inputs.ids
    order, how_many = _kept_tokens(ids)
    N = ids.numel() if ids.is_cuda else how_many()
    chunk, _ = token_chunk(N, inputs.tile_call(needs))
    for begin in range(0, N, chunk):
        if begin and ids.is_cuda:
            N = how_many()
            if begin >= N:
                return
        end = min(begin + chunk, N)
        yield slice(begin, end) if order is None else order[begin:end]


def _round(logits: Tensor, dtype: torch.dtype) -> None:
    """Round logits [C, V] to a dtype, a few rows at a time: the rounded copy is not in the workspace."""
    for rows in logits.split(max(1, 2**20 // logits.shape[1])):
        rows.copy_(rows.to(dtype))


class ChunkRunner:
    """Computes the chunks of a head call: their logits by one GEMM, and their statistics.

    The logits live in one tile until the next chunk; with a tail on a GPU in two, until the chunk after the
    next (tail_columns.py: `chunks_with_columns`).
    """

    def __init__(self, inputs: HeadInputs, operands: Operands, stats: Tensor) -> None:
        self.inputs, self.operands, self.stats = inputs, operands, stats
        self.tiles: list[Tensor] = []
        self.screen = Screen(inputs, operands.weight, operands.bias) if inputs.options.screen else None

    def run(self, tokens: Tensor | slice, *, rows: int, fill_stats: bool) -> TokenChunk:
        """The chunk of these tokens.

        rows: of the tile, at least the tokens. fill_stats: write the table; otherwise read it.
        """
        inputs, operands = self.inputs, self.operands
        ids = inputs.ids[tokens]
        states = operands.states(inputs, tokens)
        logits = self._tile(rows)[: ids.numel()]
        local_ids = inputs.local_ids(ids)
        if self.screen is not None:
            stats = self.screen.fill(states[0], ids, logits)
            if fill_stats:
                self.stats[:, tokens] = stats
            return TokenChunk(tokens, ids, states, self.stats[:, tokens].contiguous(), logits)
        if logits.shape[1]:
            mm(states[0], operands.weight.t(), logits)
            if operands.lora_weight is not None:
                mm(states[1], operands.lora_weight.t(), logits, add=True)
            if inputs.options.logits_dtype is not None:
                _round(logits, inputs.options.logits_dtype)
        if fill_stats:
            self.stats[:, tokens] = self._stats(logits, ids, local_ids)
        return TokenChunk(tokens, local_ids, states, self.stats[:, tokens].contiguous(), logits)

    def _stats(self, logits: Tensor, ids: Tensor, local_ids: Tensor) -> Tensor:
        """Statistics [7, C] of whole rows; of a sharded head one all-gather."""
        inputs = self.inputs
        if logits.shape[1]:
            stats = row_stats(logits[None], local_ids, self.operands.bias, inputs.options.transform)
        else:  # a rank without rows
            stats = stats_of_no_rows(ids.numel(), logits)
        options = inputs.options
        if options.shards is None:
            return stats
        return whole_stats(stats, ids, options.shards, inputs.group, lean=options.lean)

    def _tile(self, rows: int) -> Tensor:
        if not self.tiles:
            inputs = self.inputs
            number = 2 if inputs.options.tail_eps is not None and inputs.ids.is_cuda else 1
            shape, dtype = (rows, inputs.weight.shape[0]), self.operands.accumulator
            self.tiles = [torch.empty(shape, dtype=dtype, device=inputs.hidden.device) for _ in range(number)]
        self.tiles.append(self.tiles.pop(0))
        return self.tiles[-1]


def run_chunks(
    runner: ChunkRunner, chunks: Iterable[Tensor | slice], *, fill_stats: bool, rows: int = 0
) -> Iterator[TokenChunk]:
    """The chunks one after another; rows: tokens of the largest, which is the first if not given."""
    for tokens in chunks:
        rows = rows or runner.inputs.ids[tokens].numel()
        yield runner.run(tokens, rows=rows, fill_stats=fill_stats)


def run_groups(runner: ChunkRunner, groups: Sequence[Sequence[Tensor]]) -> Iterator[TokenChunk]:
    """Chunks of groups; a group's chunks come when the statistics of all of them are in the table.

    The group's last chunk comes first, because its logits are in memory. The others' are recomputed.
    """
    rows = max((len(tokens) for group in groups for tokens in group), default=0)
    for *before, last in groups:
        for tokens in before:
            runner.run(tokens, rows=rows, fill_stats=True)
        yield runner.run(last, rows=rows, fill_stats=True)
        for tokens in before:
            yield runner.run(tokens, rows=rows, fill_stats=False)


def screen_statistics(runner: ChunkRunner, screen: Screen) -> None:
    """Fill the table without logits in memory, but for the tokens that cannot be screened."""
    inputs, operands = runner.inputs, runner.operands
    order, how_many = _kept_tokens(inputs.ids)
    tokens = torch.arange(how_many()) if order is None else order
    unresolved = []
    for part in tokens.split(CODED_TOKENS):
        stats, missing = screen.run(inputs.hidden[part].to(operands.factor), inputs.ids[part])
        runner.stats[:, part] = stats
        unresolved.append(part[missing])
    exact = inputs._replace(options=inputs.options._replace(screen=False))
    left = torch.cat(unresolved) if unresolved else tokens
    if not left.numel():
        return
    ids = torch.full_like(inputs.ids, -1)
    ids[left] = inputs.ids[left]
    exact = exact._replace(ids=ids)
    for _ in run_chunks(
        ChunkRunner(exact, operands, runner.stats), planned_chunks(exact, NeedsGrad()), fill_stats=True
    ):
        pass
