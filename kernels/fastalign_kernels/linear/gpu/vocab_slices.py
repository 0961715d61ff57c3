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
from typing import NamedTuple

import torch
from torch import Tensor

from ...softmax.slice_rows_triton import new_running, slice_stats
from ...softmax.tile_rows_triton import tile_grad
from ..engine import Engine, Gradients, TokenCoefficients, empty_gradients, hidden_grad_dtype
from ..inputs import HeadInputs, NeedsGrad
from .head_call import HeadCall, product, write_logits
from .plan import GRANULE, slice_width


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


class _Slice(NamedTuple):
    """A slice of the vocabulary and its logits."""

    columns: slice
    weights: tuple[Tensor, ...]  # their rows of the weight, and of a LoRA adapter's B
    logits: Tensor  # [count, columns]; they live until the next slice, and may be overwritten


def _slices(call: HeadCall, width: int) -> Iterator[_Slice]:
    """Compute the slices one after another, in one memory."""
    tokens, V = call.tokens, call.inputs.vocab_size
    memory = torch.empty(tokens.count * width, dtype=call.logits_dtype, device=call.table.device)
    for first in range(0, V, width):
        columns = slice(first, min(first + width, V))
        # rows of `width` numbers, also of the last slice's
        logits = memory[: tokens.count * width].view(tokens.count, width)[:, : columns.stop - first]
        weights = tuple(weight[columns] for weight in call.weights)
        write_logits(tokens.states(0, tokens.count), weights, logits)
        yield _Slice(columns, weights, logits)


def _run_statistics(call: HeadCall, width: int) -> None:
    """Fill the table with the statistics of all slices."""
    tokens, V = call.tokens, call.inputs.vocab_size
    running = new_running(call.inputs.ids)
    for columns, _, logits in _slices(call, width):
        rows = tokens.rows(0, logits.shape[0])
        slice_stats(logits, rows, call.softmaxes, running, columns.start, V)
        tokens.settle()


def _run_gradients(call: HeadCall, width: int, coefficients: Tensor, needs: NeedsGrad) -> Gradients:
    """Gradients for coefficients [4, N], from the table."""
    hidden, tokens, device = call.inputs.hidden, call.tokens, call.table.device
    grads = empty_gradients(call.inputs, needs._replace(hidden=False, lora_hidden=False))
    d_weights = (grads.weight, grads.lora_weight)
    states_grad, weight_grad = (needs.hidden, needs.lora_hidden), (needs.weight, needs.lora_weight)
    low = torch.empty(0 if call.in_place else tokens.count * width, dtype=hidden.dtype, device=device)
    sums: list[Tensor] = []  # of dX and dU
    for part in _slices(call, width):
        logits, columns = part.logits, part.columns
        count, size = logits.shape
        dlogits = logits if call.in_place else low[: count * width].view(count, width)[:, :size]
        given = coefficients[:, tokens.index(0, count)].contiguous()
        rows = tokens.rows(0, count)
        tile_grad(logits, rows, call.softmaxes, given, dlogits, first_column=columns.start)
        tokens.settle()
        count = tokens.count
        dlogits = dlogits[:count]
        if not sums:
            sums = [
                torch.empty(count if need else 0, weight.shape[1], dtype=call.table.dtype, device=device)
                for need, weight in zip(states_grad, part.weights)
            ]
        for number, states in enumerate(tokens.states(0, count)):
            if states_grad[number]:
                product(dlogits, part.weights[number], sums[number], add=columns.start > 0)
            if weight_grad[number]:
                product(dlogits.t(), states, d_weights[number][columns])
        if needs.bias:
            grads.bias[columns] = dlogits.sum(0, dtype=call.table.dtype)
    del part, logits, dlogits, low  # dX takes their memory
    if needs.hidden:
        dtype = hidden_grad_dtype(call.inputs)
        grads = grads._replace(hidden=_of_all_tokens(sums[0].to(dtype), call))
    if needs.lora_hidden and call.inputs.lora is not None:
        dtype = call.inputs.lora.hidden.dtype
        grads = grads._replace(lora_hidden=_of_all_tokens(sums[1].to(dtype), call))
    return grads


def _of_all_tokens(d_states: Tensor, call: HeadCall) -> Tensor:
    """The gradient [N, K] from that of the tokens that are not ignored."""
    tokens = call.tokens
    if tokens.indices is None:
        return d_states
    shape = (len(call.inputs.ids), d_states.shape[1])
    return d_states.new_zeros(shape).index_copy_(0, tokens.indices, d_states)
