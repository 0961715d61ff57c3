"""The head's engine for GPUs that run epilogue.py and have little free memory: one slice of the
vocabulary at a time, for all tokens.

    statistics    the GEMM of epilogue.py that keeps nothing
    slices        the GEMM again for a slice, with the row's lse as reference: e is P itself. Then the slice's
                  rows of dW are one GEMM in their final dtype, and dX is added up in fp32

dlogits = row_scale P in most rows (epilogue_rows_triton.py), with one factor for all slices: the hidden
states of dW are scaled once. Between the passes nothing is kept but the table [7, N], so any loss and any
upstream gradient runs so.

    call          GEMMs          memory beside the gradients, S columns a slice
    frozen        2 + dX         2 N S + 6 N H bytes, of which 2 N H when the slices are gone
    training      2 + dX + dW    2 N S + 8 N H

Bytes beside the GEMMs' own: 24 N V / 256 of the tiles' numbers, 8 N H a slice of dX's sum. vocab_slices.py,
which other GPUs take, moves 16 N V.

Errors: those of epilogue.py, except that the target's element is rounded like all elements.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...gemm import mm
from ...softmax.rows import Stat
from ..engine import Gradients, TokenCoefficients, empty_gradients, empty_stats, of_table
from ..inputs import HeadInputs, NeedsGrad
from .epilogue import LEAN_TOKENS, EpilogueStatistics
from .epilogue_call import Block, EpilogueCall, state_numbers
from .plan import GRANULE, epilogue_slice_width, row_elements


class EpilogueSlices(EpilogueStatistics):
    """The engine of this file. It saves nothing between the passes."""

    def saves(self, inputs: HeadInputs, needs: NeedsGrad) -> bool:
        return False

    def width(self, inputs: HeadInputs, needs: NeedsGrad) -> int:
        """Columns of a slice."""
        width = epilogue_slice_width(inputs.gpu_call(needs, self.workspace_mib))
        return width or min(GRANULE, inputs.vocab_size)  # fewer columns are too few for a GEMM

    def gradients(
        self, inputs: HeadInputs, stats: Tensor, saved: list[Tensor], coefficients: Tensor, needs: NeedsGrad
    ) -> Gradients:
        """The gradients: one GEMM of the logits, and one for each gradient."""
        width = self.width(inputs, needs)
        return _gradients(self._call(inputs), width, stats, of_table(coefficients), needs)

    def statistics_and_gradients(
        self, inputs: HeadInputs, token_coefficients: TokenCoefficients, needs: NeedsGrad
    ) -> tuple[Tensor, Gradients]:
        """The table and the gradients: two GEMMs of the logits, and one for each gradient."""
        call, stats = self._call(inputs), empty_stats(inputs)
        for begin in range(0, call.N, LEAN_TOKENS):
            call.forward(begin, min(LEAN_TOKENS, call.N - begin), stats, None)
        return stats, _gradients(call, self.width(inputs, needs), stats, token_coefficients, needs)


class _Slices:
    """The slices of a call, which share one memory."""

    def __init__(self, call: EpilogueCall, width: int, stats: Tensor) -> None:
        self.call, self.width = call, width
        self.block = self._gathered(stats)
        kept = call.inputs.hidden.new_empty(call.N * row_elements(width))
        self.memory = kept.view(call.N, row_elements(width))

    def _gathered(self, stats: Tensor) -> Block:
        """A block of all tokens, with each row's lse as reference; `kept` is not its memory yet."""
        call, N = self.call, self.call.N
        numbers = state_numbers(call.tiles, self.width, 2) * N
        state = torch.empty(numbers, dtype=torch.float32, device=stats.device)
        # A call that has not found the order of its tokens yet does so here, and would overwrite the table.
        block = call.gather(0, N, state, state, None if call.ordered else torch.empty_like(stats))
        order = call.order[:N].long()
        largest, logsum = (
            stats[stat].index_select(0, order) / math.log(2) for stat in (Stat.MAX, Stat.LOGSUM)
        )
        reference = state[: 3 * N].view(3, N)
        torch.add(largest, logsum, out=reference[0])
        reference[1], reference[2] = largest, logsum
        return block

    def write(self, first: int) -> Block:
        """P of columns `first`, ... of all tokens: queues its kernel."""
        call, V = self.call, self.call.V
        columns = slice(first, min(first + self.width, V))
        bias = None if call.inputs.bias is None else call.inputs.bias[columns]
        # Ids count from `first`; those below it come behind the vocabulary's end, and -1 stays.
        ids = self.block.ids
        ids = torch.where(ids < 0, ids, torch.remainder(ids - first, V))
        part = self.block._replace(ids=ids, kept=self.memory[:, : columns.stop - first])
        flags = {"KEEP": True, "ENTROPY": False, "MEAN": False}
        call.write_tiles(part, call.tiles.kept, call.weight[columns], bias, **flags)
        return part


def _gradients(
    call: EpilogueCall, width: int, stats: Tensor, coefficients: TokenCoefficients, needs: NeedsGrad
) -> Gradients:
    """Gradients from the table [7, N]."""
    slices = _Slices(call, width, stats)
    part = slices.write(0)
    rows = call.how_many()  # after the first slice is queued
    if rows == 0:
        nothing = empty_gradients(call.inputs, needs)
        for grad in nothing:
            grad.zero_()
        return nothing
    grads = empty_gradients(call.inputs, needs._replace(hidden=False))
    tokens = call.tokens(part, rows)
    table = coefficients(stats[:, tokens], tokens)
    scaled = torch.empty_like(part.hidden[: rows if needs.head else 0])
    d_hidden = stats.new_empty(rows if needs.hidden else 0, call.H)
    for first in range(0, call.V, width):
        if first > 0:
            part = slices.write(first)
        columns, dlogits = slice(first, first + part.kept.shape[1]), part.kept[:rows]
        of_hidden = NeedsGrad(weight=needs.head and first == 0)  # the first slice scales for all
        row_scale = call.dlogits(part, rows, stats, lambda *_: table, of_hidden, scaled)
        if needs.hidden:
            mm(dlogits, call.weight[columns], d_hidden, add=first > 0)
        if needs.weight:
            mm(dlogits.t(), scaled, grads.weight[columns])
        if needs.bias:
            grads.bias[columns] = call.column_sums(dlogits, row_scale)
    del slices, part, dlogits, scaled  # dX takes their memory
    if not needs.hidden:
        return grads
    out = empty_gradients(call.inputs, NeedsGrad(hidden=True)).hidden
    if rows < call.N:
        out.zero_()
    call.scatter(d_hidden, row_scale, 0, out)
    return grads._replace(hidden=out)
