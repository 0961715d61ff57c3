"""The head's engine for GPUs: dlogits of many tokens are kept in 16 bits, so that dX and dW are a GEMM each.

Tokens go through an fp32 tile of logits, C at a time. One launch computes a tile's statistics and writes its
dlogits, rounded once to the GEMMs' dtype, into memory for K tokens. When K tokens are there, dX and dW are
one GEMM each. If all N tokens fit, dW is written once, in its final dtype. Otherwise blocks of K tokens are
summed in fp32.

    call                              GEMMs          memory beside the gradients
    no gradient                       1              a tile, 4 C V bytes
    a loss fixed by token statistics  1 + dX + dW    a tile and 2 K V; with N > K also dW's sum, 4 V H
    any upstream gradient             1 + dX + dW    the same; P is kept for K tokens between the passes
                                      2 + dX + dW    for the tokens beyond K, whose logits are recomputed
    frozen weight                     1 + dX         a tile and its dlogits, 6 C V bytes

A larger tile uses the memory of later dlogits until these are computed. Bytes moved beside the GEMMs'
own: 12 a logit (the tile is written in place of bf16 logits and read twice; dlogits are written). Measured on
an H200 at 8192 x 4096 x 151936 in bf16: 48.5 ms where three bare GEMMs take 44.5 and token tiles took 65.6.

What is kept of P is bf16 for bf16. For fp16 it is P 2^15 in fp16: P itself would lose digits below 2^-14 and
vanish below 2^-24, and P 2^15 keeps all digits of P from 2^-29 on. It is off by at most 2^-8 of itself in
bf16 and 2^-11 in fp16; `kept_grad` says what that does to gradients. fp32 hidden states keep their logits
instead, and nothing is rounded: 4 bytes a logit, and the gradient overwrites them. With
logits_dtype=torch.bfloat16 the logits' GEMM writes bf16 into the kept memory, where the gradient overwrites
them: no tile, and 4 bytes a logit beside the GEMMs' own.

Under graph capture ignored tokens keep their places. The order of the tokens is saved with P, so that a
forward pass that was captured and a backward pass that is not agree, and the other way round.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...softmax.tile_rows_triton import (
    Rows,
    TokenLoss,
    kept_grad,
    tile_grad,
    tile_loss,
    tile_softmax,
    tile_stats,
)
from ..engine import Engine, Gradients, TokenCoefficients, hidden_grad_dtype
from ..inputs import HeadInputs, NeedsGrad
from ..product_grads import Product, gradients_of, products_of
from ..token_losses import TokenCrossEntropy
from . import plan as gpu_plan
from .head_call import HeadCall, product, write_logits
from .plan import TileSizes, keeps_softmax, saved_sizes, tile_sizes
from .tokens import Tokens

SOFTMAX_SCALE = {torch.bfloat16: 1.0, torch.float16: 2.0**15}

# logits of a tile, its rows, where its dlogits go
Write = Callable[[Tensor, Rows, "tuple[int, int]", Tensor], None]


class _Block(NamedTuple):
    """Positions of tokens whose dlogits are in memory together."""

    begin: int
    end: int


class _ProductSums:
    """The gradients of one product of the logits, a block of tokens at a time."""

    def __init__(
        self,
        product_of: Product,
        tokens: Tokens,
        *,
        states_dtype: torch.dtype,
        single: bool,
    ) -> None:
        """single: there is one block, so the weight's gradient needs no fp32 sum."""
        self.product, self.tokens = product_of, tokens
        states, weight = product_of.states, product_of.weight
        self.d_states, self.d_weight = states.new_empty(0), weight.new_empty(0)
        N = len(states)
        if product_of.states_grad:
            allocate = torch.empty if tokens.count == N and N else torch.zeros
            self.d_states = allocate(states.shape, dtype=states_dtype, device=states.device)
        if product_of.weight_grad:
            sum_dtype = weight.dtype if single else torch.float32
            self.d_weight = torch.empty(weight.shape, dtype=sum_dtype, device=weight.device)

    def add_states(self, block: _Block, dlogits: Tensor) -> None:
        begin, end = block
        operand = self.product.operand
        if self.product.states_grad:
            index = self.tokens.index(begin, end)
            if isinstance(index, slice):
                product(dlogits, operand, self.d_states[index])
            else:
                rows = torch.empty(
                    end - begin, operand.shape[1], dtype=self.d_states.dtype, device=dlogits.device
                )
                product(dlogits, operand, rows)
                self.d_states.index_copy_(0, index, rows)

    def add_weight(self, dlogits: Tensor, states: Tensor, *, first: bool) -> None:
        if self.product.weight_grad:
            product(dlogits.t(), states, self.d_weight, add=not first)

    def finish(self, *, empty: bool) -> tuple[Tensor, Tensor]:
        if empty:
            self.d_weight.zero_()
        return self.d_states, self.d_weight.to(self.product.weight.dtype)


class _Sums:
    """dX, dW, those of a LoRA adapter and the bias's gradient, a block of tokens at a time."""

    def __init__(self, call: _Call, needs: NeedsGrad, most: int) -> None:
        """most: tokens of a block. The tokens are settled."""
        inputs = self.inputs = call.inputs
        self.hidden_done = call.hidden_done
        self.needs, self.tokens = needs, call.tokens
        self.empty = True
        single = self.tokens.count <= most
        self.products = [
            _ProductSums(
                product_of,
                self.tokens,
                states_dtype=product_of.states.dtype if number else hidden_grad_dtype(inputs),
                single=single,
            )
            for number, product_of in enumerate(products_of(inputs, call.weights, needs))
        ]
        self.d_bias = inputs.hidden.new_empty(0)
        if needs.bias and inputs.bias is not None:
            self.d_bias = torch.zeros(inputs.bias.shape, dtype=torch.float32, device=inputs.bias.device)

    def add(self, block: _Block, dlogits: Tensor) -> None:
        if block.begin == block.end:
            return
        for sums in self.products:
            sums.add_states(block, dlogits)
        if self.hidden_done is not None and self.needs.hidden and block.end == self.tokens.count:
            self.hidden_done(self.products[0].d_states)
        for sums, states in zip(self.products, self.tokens.states(*block)):
            sums.add_weight(dlogits, states, first=self.empty)
        if self.needs.bias:
            self.d_bias += dlogits.sum(0, dtype=torch.float32)
        self.empty = False

    def finish(self) -> Gradients:
        bias = self.inputs.bias
        d_bias = self.d_bias if bias is None or not self.needs.bias else self.d_bias.to(bias.dtype)
        return gradients_of([sums.finish(empty=self.empty) for sums in self.products], d_bias)


class KeptSoftmax(Engine):
    """The engine of this file."""

    def __init__(self, workspace_mib: float, saved_mib: float | None = None) -> None:
        """workspace_mib: MiB of the tile and of what is kept, if the call does not say. saved_mib: MiB for
        what is kept between the passes if all of it fits, and the call does not say."""
        self.workspace_mib, self.saved_mib = workspace_mib, saved_mib

    def sizes(self, inputs: HeadInputs, needs: NeedsGrad) -> TileSizes:
        """The sizes of a call."""
        return tile_sizes(inputs.gpu_call(needs, self.workspace_mib))

    def saved_sizes(self, inputs: HeadInputs, needs: NeedsGrad) -> TileSizes:
        """The sizes where P is kept between the passes."""
        return saved_sizes(inputs.gpu_call(needs, self.workspace_mib, saved_mib=self.saved_mib))

    def saves(self, inputs: HeadInputs, needs: NeedsGrad) -> bool:
        options = inputs.options
        return any(needs) and (
            options.logits_dtype is not None  # they are kept, not P
            or keeps_softmax(inputs.hidden.dtype, inputs.vocab_size, options.softcap, options.temperature)
        )

    def empty_saved(self, inputs: HeadInputs, needs: NeedsGrad) -> list[Tensor]:
        if not self.saves(inputs, needs):
            return []
        hidden = inputs.hidden
        return [
            hidden.new_empty(self.saved_sizes(inputs, needs).block, inputs.vocab_size),
            hidden.new_empty(hidden.shape[0] + 1, dtype=torch.int64),
        ]

    def statistics(self, inputs: HeadInputs, needs: NeedsGrad) -> tuple[Tensor, list[Tensor]]:
        call = _Call(inputs)
        if not self.saves(inputs, needs):
            call.run_statistics(self.sizes(inputs, NeedsGrad()))
            return call.table, []
        sizes = self.saved_sizes(inputs, needs)
        kept = inputs.hidden.new_empty(sizes.block, inputs.vocab_size)

        def write(logits: Tensor, rows: Rows, positions: tuple[int, int], out: Tensor) -> None:
            if call.in_place:
                tile_stats(logits, rows, call.softmaxes)
            else:
                tile_softmax(logits, rows, call.softmaxes, out, SOFTMAX_SCALE[kept.dtype])

        tile = call.new_tile(sizes)
        call.fill(_Block(0, len(kept)), kept, tile, sizes.tile, write)
        if len(kept) < call.tokens.count:
            rest = call.new_rows(sizes.tile) if tile is None else tile
            call.fill(_Block(len(kept), call.tokens.count), None, rest, sizes.tile, call.write_stats)
        return call.table, [kept, call.tokens.order]

    def gradients(
        self, inputs: HeadInputs, stats: Tensor, saved: list[Tensor], coefficients: Tensor, needs: NeedsGrad
    ) -> Gradients:
        """The gradients; overwrites `saved`. Without it (a second backward pass) logits are recomputed."""
        call = _Call(inputs, stats, saved[1] if saved else None)
        call.hidden_done = self.hidden_done
        tokens = call.tokens
        done = 0
        sums: _Sums | None = None
        sizes = self.saved_sizes(inputs, needs) if saved else self.sizes(inputs, needs)
        if saved:
            kept = saved[0]
            call.write_kept(kept, coefficients)
            tokens.settle()
            sums = _Sums(call, needs, len(kept))
            done = min(len(kept), tokens.count)
            sums.add(_Block(0, done), kept[:done])
        else:
            kept = call.new_kept(sizes)
        if done < tokens.count:

            def write(logits: Tensor, rows: Rows, positions: tuple[int, int], out: Tensor) -> None:
                index = tokens.index(*positions)
                tile_grad(logits, rows, call.softmaxes, coefficients[:, index].contiguous(), out)

            sums = call.run_blocks(needs, kept, sizes, write, sums, done)
        if sums is None:  # all tokens are ignored
            sums = _Sums(call, needs, 1)
        return sums.finish()

    def statistics_and_gradients(
        self, inputs: HeadInputs, token_coefficients: TokenCoefficients, needs: NeedsGrad
    ) -> tuple[Tensor, Gradients]:
        call = _Call(inputs)
        sizes = self.sizes(inputs, needs)
        softmaxes = call.softmaxes

        def write(logits: Tensor, rows: Rows, positions: tuple[int, int], out: Tensor) -> None:
            if isinstance(token_coefficients, TokenCrossEntropy):
                ce = token_coefficients
                loss = TokenLoss(ce.filled_scale(), ce.label_smoothing, ce.z_loss)
                tile_loss(logits, rows, softmaxes, loss, out)
                return
            tile_stats(logits, rows, softmaxes)
            index = call.tokens.index(*positions)
            given = token_coefficients(call.table[:, index].contiguous(), index)
            tile_grad(logits, rows, softmaxes, given, out)

        sums = call.run_blocks(needs, call.new_kept(sizes), sizes, write, None, 0)
        return call.table, sums.finish()


def _larger_tile(kept: Tensor, used: int, tile: Tensor) -> Tensor:
    """Memory for a tile's logits, in fp32: the end of `kept` [K, V] if more tokens fit there than in `tile`.

    A token takes three rows of what is free in `kept`: one for its dlogits and two for its fp32 logits.
    """
    K, V = kept.shape
    n = min(gpu_plan.TILES[0], (K - used) // 3 // gpu_plan.GRANULE * gpu_plan.GRANULE)
    # the row kernels and the GEMMs read faster from addresses that are multiples of 128 bytes
    first = (K - 2 * n) * V // 64 * 64
    if n <= len(tile) or first < (used + n) * V:
        return tile
    return kept.view(-1)[first : first + 2 * n * V].view(torch.float32).view(n, V)


class _Call(HeadCall):
    """The loops over tiles and blocks."""

    hidden_done: Callable[[Tensor], None] | None = None  # see Engine

    def new_rows(self, count: int) -> Tensor:
        V = self.inputs.vocab_size
        return torch.empty(count, V, dtype=self.logits_dtype, device=self.table.device)

    def new_tile(self, sizes: TileSizes) -> Tensor | None:
        """Memory of a tile's logits; None where they lie in the memory that is kept."""
        return None if self.in_place else self.new_rows(sizes.tile)

    def new_kept(self, sizes: TileSizes) -> Tensor:
        return self.inputs.hidden.new_empty(sizes.block, self.inputs.vocab_size)

    def write_stats(self, logits: Tensor, rows: Rows, positions: tuple[int, int], out: Tensor) -> None:
        tile_stats(logits, rows, self.softmaxes)

    def write_kept(self, kept: Tensor, coefficients: Tensor) -> None:
        """Turn kept P, or logits, into dlogits for coefficients [4, N]."""
        end = min(len(kept), self.tokens.count)
        rows, index = self.tokens.rows(0, end), self.tokens.index(0, end)
        given = coefficients[:, index].contiguous()
        kept = kept[:end]
        if self.in_place:
            tile_grad(kept, rows, self.softmaxes, given, kept)
        else:
            kept_grad(kept, kept, rows, self.softmaxes, given, SOFTMAX_SCALE[kept.dtype])

    def run_statistics(self, sizes: TileSizes) -> None:
        self.fill(_Block(0, self.tokens.count), None, self.new_rows(sizes.tile), sizes.tile, self.write_stats)

    def fill(self, block: _Block, kept: Tensor | None, tile: Tensor | None, size: int, write: Write) -> None:
        """Compute the logits of the block's tokens a tile at a time, and hand each to `write`.

        `write` gets the tile's rows of `kept` too. Settles the tokens after the first tile, and stops where
        they end.

        tile: memory for the logits of `size` tokens; None: they are computed in `kept`, where there is room
            for all of them: those that follow the first tile, whose number is then known, are one more.
        """
        tokens = self.tokens
        begin = block.begin
        while begin < min(block.end, tokens.count):
            used = begin - block.begin
            memory = tile if tile is None or kept is None else _larger_tile(kept, used, tile)
            rows = len(memory) if memory is not None else size if not tokens.settled else len(tokens.ids)
            end = min(begin + rows, block.end, tokens.count)
            out = None if kept is None else kept[used : used + end - begin]
            logits = out if memory is None else memory[: end - begin]
            assert logits is not None
            write_logits(tokens.states(begin, end), self.weights, logits)
            write(logits, tokens.rows(begin, end), (begin, end), logits if out is None else out)
            tokens.settle()
            begin = end

    def run_blocks(
        self,
        needs: NeedsGrad,
        kept: Tensor,
        sizes: TileSizes,
        write: Write,
        sums: _Sums | None,
        begin: int,
    ) -> _Sums:
        """Add the gradients of the tokens from position `begin` on, a block that fits `kept` at a time."""
        tokens = self.tokens
        tile = self.new_tile(sizes)
        while sums is None or begin < tokens.count:
            block = _Block(begin, begin + len(kept))
            self.fill(block, kept, tile, sizes.tile, write)
            block = _Block(begin, min(block.end, tokens.count))
            if block.end == tokens.count:
                tile = None  # its memory is free for the gradients
            if sums is None:
                sums = _Sums(self, needs, len(kept))
            sums.add(block, kept[: block.end - block.begin])
            begin = block.end
        return sums
