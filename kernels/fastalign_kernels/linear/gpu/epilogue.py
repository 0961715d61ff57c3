"""The engine whose logits GEMM has the statistics in its epilogue: logits never reach memory.

    forward    z = hidden weight^T in tiles; each tile's maximum and sums, and where gradients are needed
               e = 2^(z - r) in 16 bits, [K, V] for K tokens
    dlogits    one element of a row (epilogue_rows_triton.py says when a row needs a pass over e)
    dX, dW     one cuBLAS GEMM each

The engine moves 0.1 bytes a logit beside the GEMMs' own, where kept softmax moves 12. Memory: the
gradients, 2 V bytes a kept token, and for K tokens 8 H bytes (hidden states, dX in fp32) and V / 32 bytes
(the tiles' sums; V / 16 with all statistics). Without gradients it needs only the hidden states and the
tiles' sums.

Errors: the statistics are those of fp32 logits. e is rounded once, as dlogits are in other engines. In bf16
the hidden states are rounded again when they take over a row's factor in dW: an element dW[v, h] is off by
up to 2^-8 sum_t |dlogits[t, v] x[t, h]| more than in other engines. A row's factor takes up the rounding of
the target's element, which makes that element exact. Measured on an H200 in bf16 (2026-11-27), relative to
the norm: dX is off by 1.7e-3 and dW by 2.3e-3. PyTorch in bf16 is off by 2.3e-3 to 3.0e-3, and by 2.4e-2
with logits of 30 and more. The gradient of an entropy and the slope of a softcap take z from the rounded e,
which is off by at most 0.004 nats.
PyTorch's bf16 logits are off by up to 2^-8 |z|, so below |z| = 1 the gradient of an entropy alone is less
exact here.

Ignored tokens enter no GEMM. The device counts the remaining tokens. The host reads that count after it has
queued the forward kernel, so it waits only for what was queued before. Under graph capture all tokens run.
The ignored ones then have hidden states and dlogits of zero. The order of the tokens is saved with e, so that
a pass that was captured and one that was not agree.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...device import architecture, multiprocessors
from ..engine import Engine, Gradients, TokenCoefficients, empty_stats, of_table
from ..inputs import HeadInputs, NeedsGrad
from .epilogue_call import Block, CallTiles, EpilogueCall, Tiles, state_size
from .epilogue_gradients import BlockGradients
from .plan import MOST_MIB, MOST_SAVED_MIB, GpuCall, epilogue_saved, epilogue_tokens, row_elements

LEAN_TOKENS = 32768  # of a block without any gradient: a token takes only 2 H + V / 16 bytes


class TileChoice(NamedTuple):
    """Tiles for hidden states of at most `largest_hidden` numbers."""

    largest_hidden: float
    lean: Tiles  # two statistics are not used, e is kept
    full: Tiles  # all statistics, e is kept
    not_kept: Tiles


# By compute capability. Those that no GPU has measured are compiled, and not used. The forward kernel on an
# H200 (2026-11-27, bench.gpu.tune_epilogue), times cuBLAS's GEMM at H 4096, 2048, 896 and 576: lean 1.065,
# 1.11, 1.24 and 1.31, with all statistics 1.067, 1.17, 1.32 and 1.39, where e is not kept 1.067, 1.05, 1.20
# and 1.17. With all statistics the lean tiles would spill.
_FULL = Tiles(group=32)
_SMALL_LEAN = Tiles(stages=3, group=16, parts=2)
_SMALL_NOT_KEPT = Tiles(stages=3, group=16, parts=2, branch=False)
_LARGE_LEAN = Tiles(stages=3, group=32, parts=2, branch=False)
_SM_100 = Tiles(bn=128, warps=4, stages=3)
TILES: dict[int, list[TileChoice]] = {
    90: [
        TileChoice(3071, lean=_SMALL_LEAN, full=_FULL, not_kept=_SMALL_NOT_KEPT),
        TileChoice(math.inf, lean=_LARGE_LEAN, full=_FULL, not_kept=Tiles()),
    ],
    100: [TileChoice(math.inf, lean=_SM_100, full=_SM_100, not_kept=_SM_100)],
}


def tiles_for(architecture: int, hidden_size: int) -> TileChoice:
    """The tiles of an architecture in TILES."""
    return next(choice for choice in TILES[architecture] if hidden_size <= choice.largest_hidden)


class EpilogueStatistics(Engine):
    """The engine of this file.

    unkept_tokens: tokens of a block whose e is not kept.
    workspace_mib: of calls that do not say. saved_mib: for e that is kept until the backward pass, of calls
    that do not say and if all of it fits. tiles: they replace the table's.
    """

    unkept_tokens = LEAN_TOKENS

    def __init__(
        self,
        workspace_mib: float = MOST_MIB,
        *,
        saved_mib: float = MOST_SAVED_MIB,
        tiles: Tiles | None = None,
    ) -> None:
        self.workspace_mib, self.saved_mib, self.tiles = workspace_mib, saved_mib, tiles

    def statistics(self, inputs: HeadInputs, needs: NeedsGrad) -> tuple[Tensor, list[Tensor]]:
        """The table [7, N], and what `empty_saved` describes, which `gradients` uses once."""
        saved = self.empty_saved(inputs, needs)
        kept, state, order, *_ = saved or (None, None, None)
        call, stats = self._call(inputs, order), empty_stats(inputs)
        first = 0
        if kept is not None and kept.shape[0]:
            first = kept.shape[0]
            self.save(call.forward(0, first, stats, kept[:, : call.V], state), saved)
        most = self.unkept_tokens
        for begin in range(first, call.N, most):  # a block beyond the last token is an empty loop
            call.forward(begin, min(most, call.N - begin), stats, None)
        return stats, saved

    def empty_saved(self, inputs: HeadInputs, needs: NeedsGrad) -> list[Tensor]:
        """e [K, V] of the first K tokens, which `gradients` overwrites, their state, and the order of the
        tokens [N + 1]."""
        if not self.saves(inputs, needs):
            return []
        hidden, V = inputs.hidden, inputs.vocab_size
        K = epilogue_saved(self._plan(inputs, needs))
        return [
            hidden.new_empty(K, row_elements(V)),
            hidden.new_empty(state_size(inputs, self._tiles(inputs), K), dtype=torch.float32),
            hidden.new_empty(hidden.shape[0] + 1, dtype=torch.int32),
        ]

    def gradients(
        self,
        inputs: HeadInputs,
        stats: Tensor,
        saved: list[Tensor],
        coefficients: Tensor,
        needs: NeedsGrad,
    ) -> Gradients:
        """The gradients: 3 GEMMs for the tokens whose e was saved, 4 for the rest."""
        of_tokens = of_table(coefficients)
        if saved and saved[0].shape[0]:
            kept, _, order, *_ = saved
            K = kept.shape[0]
            call = self._call(inputs, order, filled=True)
            gradients = self.new_gradients(call, needs, single=K == call.N)
            block = self.saved_block(call, saved)
            gradients.add(gradients.factors(block, stats, of_tokens))
            _add_blocks(gradients, (K, K), kept, torch.empty_like(stats), stats, of_tokens)
        else:
            call, K = self._call(inputs), self._kept(inputs, needs)
            gradients = self.new_gradients(call, needs, single=K == call.N)
            _add_blocks(gradients, (K, 0), None, torch.empty_like(stats), stats, of_tokens)
        return gradients.finish()

    def statistics_and_gradients(
        self, inputs: HeadInputs, token_coefficients: TokenCoefficients, needs: NeedsGrad
    ) -> tuple[Tensor, Gradients]:
        """The table [7, N] and the gradients: 3 GEMMs, 2 if the head is frozen."""
        call, stats = self._call(inputs), empty_stats(inputs)
        K = self._kept(inputs, needs)
        gradients = self.new_gradients(call, needs, single=K == call.N)
        _add_blocks(gradients, (K, 0), None, stats, stats, token_coefficients)
        return stats, gradients.finish()

    def new_call(self, *arguments: Any, filled: bool) -> EpilogueCall:
        """A call; the arguments are EpilogueCall's."""
        return EpilogueCall(*arguments, filled=filled)

    def save(self, block: Block, saved: list[Tensor]) -> None:
        """Save what `saved_block` needs beside e and the state, which lie there already."""

    def saved_block(self, call: EpilogueCall, saved: list[Tensor]) -> Block:
        """The first block as it was when it was saved."""
        kept, state, *_ = saved
        return call.gather(0, kept.shape[0], kept[:, : call.V], state)

    def new_gradients(self, call: EpilogueCall, needs: NeedsGrad, *, single: bool) -> BlockGradients:
        """Uninitialised gradients, before the first block."""
        return BlockGradients(call, needs, single=single, hidden_done=self.hidden_done)

    def _plan(self, inputs: HeadInputs, needs: NeedsGrad) -> GpuCall:
        return inputs.gpu_call(needs, self.workspace_mib, saved_mib=self.saved_mib)

    def _kept(self, inputs: HeadInputs, needs: NeedsGrad) -> int:
        return epilogue_tokens(self._plan(inputs, needs))

    def _tiles(self, inputs: HeadInputs) -> CallTiles:
        if self.tiles is not None:
            return CallTiles(self.tiles, self.tiles)
        choice = tiles_for(architecture(inputs.hidden.device.index), inputs.hidden.shape[1])
        return CallTiles(choice.lean if inputs.options.lean else choice.full, choice.not_kept)

    def _call(self, inputs: HeadInputs, order: Tensor | None = None, *, filled: bool = False) -> EpilogueCall:
        """A call with this engine's tiles; `order` and `filled` are EpilogueCall's."""
        tiles, device = self._tiles(inputs), inputs.hidden.device
        return self.new_call(inputs, tiles, multiprocessors(device), order, filled=filled)


def _add_blocks(
    gradients: BlockGradients,
    size_and_first: tuple[int, int],
    memory: Tensor | None,
    forward_stats: Tensor,
    stats: Tensor,
    coefficients: TokenCoefficients,
) -> None:
    """Add the gradients of all blocks from `first` on, through one memory for e. After the last block it is
    free for the gradients, if their factors do not lie there.

    memory: for e of a block, which may be overwritten; None: it is allocated.
    forward_stats: where the forward pass writes its statistics; stats: those that the gradients follow from.
    """
    call = gradients.call
    for begin, rows in call.blocks(*size_and_first):
        if memory is None:
            memory = call.inputs.hidden.new_empty(rows, row_elements(call.V))
        block = call.forward(begin, rows, forward_stats, memory[:rows, : call.V])
        factors = gradients.factors(block, stats, coefficients)
        del block
        if begin + rows >= call.how_many():
            memory = None
        gradients.add(factors)
