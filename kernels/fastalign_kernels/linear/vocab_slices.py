"""The head's engine for GPUs with little free memory: one slice of the vocabulary at a time, for all tokens.

A first pass computes the logits of each slice and merges their statistics into running sums. A second pass
recomputes each slice's logits and turns them into dlogits. The slice's rows of dW are then one GEMM, in their
final dtype; dX is summed in fp32.

    call          GEMMs          memory beside the gradients, S columns a slice
    no gradient   1              4 N S bytes
    frozen        2 + dX         6 N S + 4 N H (dX is made when the slices are gone)
    training      2 + dX + dW    the same

Any loss and any upstream gradient runs so: between the passes the table [7, N] is all that exists. Measured
on an H200 at 8192 x 4096 x 151936 in bf16: 65.0 ms at 1680 MiB, of which dX and dW are 1251; three bare GEMMs
took 44.5 ms.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..softmax.slice_rows_triton import new_running, slice_stats
from ..softmax.tile_rows_triton import tile_grad
from .engine import Engine, Gradients, TokenCoefficients, empty_gradients, hidden_grad_dtype
from .gpu_plan import GRANULE, slice_width
from .head_call import HeadCall, product
from .inputs import HeadInputs, NeedsGrad


class VocabSlices(Engine):
    """The engine `vocab_slices`; see engine.py. It saves nothing between the passes."""

    def __init__(self, workspace_mib: float) -> None:
        """workspace_mib: MiB of a slice's logits and dlogits, where the call does not say."""
        self.workspace_mib = workspace_mib

    def width(self, inputs: HeadInputs, needs: NeedsGrad) -> int:
        """Columns of a slice."""
        # fewer than GRANULE would be no GEMM
        return slice_width(inputs.gpu_call(needs, self.workspace_mib)) or min(GRANULE, inputs.vocab_size)

    def saves(self, inputs: HeadInputs, needs: NeedsGrad) -> bool:
        return False

    def empty_saved(self, inputs: HeadInputs, needs: NeedsGrad) -> list[Tensor]:
        return []

    def statistics(self, inputs: HeadInputs, needs: NeedsGrad) -> tuple[Tensor, list[Tensor]]:
        call = HeadCall(inputs)
        _run_statistics(call, self.width(inputs, NeedsGrad()))
        return call.table, []

    def gradients(
        self, inputs: HeadInputs, stats: Tensor, saved: list[Tensor], coefficients: Tensor, needs: NeedsGrad
    ) -> Gradients:
        call = HeadCall(inputs, stats)
        return _run_gradients(call, self.width(inputs, needs), coefficients, needs)

    def statistics_and_gradients(
        self, inputs: HeadInputs, token_coefficients: TokenCoefficients, needs: NeedsGrad
    ) -> tuple[Tensor, Gradients]:
        call = HeadCall(inputs)
        width = self.width(inputs, needs)
        _run_statistics(call, width)
        given = token_coefficients(call.table, slice(0, call.table.shape[1]))
        return call.table, _run_gradients(call, width, given, needs)


def _slices(call: HeadCall, width: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """First column, rows of the weight and logits [count, columns] of each slice. The logits live until the
    next slice, and their rows may be overwritten."""
    tokens, w = call.tokens, call.w
    memory = torch.empty(tokens.count * width, dtype=call.logits_dtype, device=w.device)
    for first in range(0, w.shape[0], width):
        part = w[first : first + width]
        # rows of `width` numbers, also of the last slice's
        logits = memory[: tokens.count * width].view(tokens.count, width)[:, : part.shape[0]]
        product(tokens.states(0, tokens.count), part.t(), logits)
        yield first, part, logits


def _run_statistics(call: HeadCall, width: int) -> None:
    """Fill the table."""
    tokens, V = call.tokens, call.w.shape[0]
    running = new_running(call.inputs.ids)
    for first, _, logits in _slices(call, width):
        slice_stats(logits, tokens.rows(0, logits.shape[0]), call.softmaxes, running, first, V)
        tokens.settle()


def _run_gradients(call: HeadCall, width: int, coefficients: Tensor, needs: NeedsGrad) -> Gradients:
    """Gradients for coefficients [4, N], from the table."""
    hidden, tokens, device = call.inputs.hidden, call.tokens, call.table.device
    grads = empty_gradients(call.inputs, needs._replace(hidden=False))
    low = torch.empty(0 if call.in_place else tokens.count * width, dtype=hidden.dtype, device=device)
    sums: Tensor | None = None
    for first, part, logits in _slices(call, width):
        count, columns = logits.shape
        dlogits = logits if call.in_place else low[: count * width].view(count, width)[:, :columns]
        given = coefficients[:, tokens.index(0, count)].contiguous()
        tile_grad(logits, tokens.rows(0, count), call.softmaxes, given, dlogits, first_column=first)
        tokens.settle()
        count = tokens.count
        dlogits = dlogits[:count]
        if needs.hidden:
            if sums is None:
                sums = torch.empty(count, part.shape[1], dtype=call.table.dtype, device=device)
            product(dlogits, part, sums, add=first > 0)
        if needs.weight:
            product(dlogits.t(), tokens.states(0, count), grads.weight[first : first + columns])
        if needs.bias:
            grads.bias[first : first + columns] = dlogits.sum(0, dtype=call.table.dtype)
    if not needs.hidden:
        return grads
    assert sums is not None
    del logits, dlogits, low  # dX takes their memory
    dtype = hidden_grad_dtype(call.inputs)
    if tokens.indices is None:
        return grads._replace(hidden=sums.to(dtype))
    d_hidden = torch.zeros(hidden.shape, dtype=dtype, device=device)
    return grads._replace(hidden=d_hidden.index_copy_(0, tokens.indices, sums.to(dtype)))
