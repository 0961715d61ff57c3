"""The engine whose logits GEMM has the statistics in its epilogue: logits never reach memory.

    forward    z = hidden weight^T in tiles; each tile's maximum and sums, and where gradients are needed
               e = 2^(z - r) in 16 bits, [K, V] for K tokens
    dlogits    one element of a row (epilogue_rows_triton.py says when a row needs a pass over e)
    dX, dW     one cuBLAS GEMM each

The engine moves 0.1 bytes a logit beside the GEMMs' own, where kept softmax moves 12. Memory: the
gradients, 2 V bytes a kept token, and for K tokens 8 H bytes (hidden states, dX in fp32) and V / 16 bytes
(the tiles' sums). Without gradients it needs only the hidden states and the tiles' sums.

Errors: the statistics are those of fp32 logits. e is rounded once, as dlogits are in other engines. In bf16
the hidden states are rounded again when they take over a row's factor in dW. Measured on an H200 in bf16,
relative to the norm: dX was off by 2.3e-3 and dW by 2.9e-3. PyTorch in bf16 is off by 2.3e-3 to 3.0e-3, and
by 2.4e-2 with logits of 30 and more. Since then a row's factor takes up the rounding of the target's
element, which makes that element exact. Simulated, dX is now off by 1.7e-3 and dW by 2.3e-3. The gradient
of an entropy and the slope of a softcap take z from the rounded e, which is off by at most 0.002 nats.
PyTorch's bf16 logits are off by 2^-9 |z|, so below |z| = 1 the gradient of an entropy alone is less
exact here.

Ignored tokens enter no GEMM. The device counts the remaining tokens. The host reads that count after it has
queued the forward kernel, so it waits only for what was queued before. Under graph capture all tokens run.
The ignored ones then have hidden states and coefficients of zero.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .engine import Engine, Gradients, TokenCoefficients, empty_stats
from .epilogue_call import BlockGradients, EpilogueCall, Tiles
from .gpu_plan import GRANULE, MOST_MIB
from .inputs import HeadInputs, NeedsGrad

# Tokens of a block where the head needs no gradient. dX is finished block by block, so a larger one gains
# nothing; without any gradient a token takes only 2 H + V / 16 bytes.
FROZEN_TOKENS = 2048
LEAN_TOKENS = 32768
# softcap / temperature up to which e of all logits of a row fits bf16's exponents. With a bias beside it the
# forward kernel would spill.
LARGEST_CAP = 40.0

# By compute capability: (largest H, tiles). Those that no GPU has measured are compiled, and not used.
TILES: dict[int, list[tuple[float, Tiles]]] = {
    90: [(3071, Tiles(group=32)), (math.inf, Tiles(stages=3, group=32, parts=2, branch=False))],
    100: [(math.inf, Tiles(bn=128, warps=4, stages=3))],
}
MEASURED = {90}


def tiles_for(architecture: int, hidden_size: int) -> Tiles:
    """The tiles of an architecture in TILES."""
    return next(tiles for largest, tiles in TILES[architecture] if hidden_size <= largest)


# For dW the hidden states are multiplied by their row's factor, which rounds them once more than other
# engines do. On an H200 (2026-11-27) dW was within twice PyTorch's error at 253 to 1,024 tokens, but not in
# the tests of a few dozen tokens, where one token decides an element. With so few tokens the launches
# decide the time anyway.
FEWEST_TOKENS = 1024


def serves(inputs: HeadInputs, architecture: int) -> bool:
    """Whether this engine can run a call on a GPU of this compute capability (90 for an H100)."""
    hidden, weight, _, bias, options = inputs
    softcap, temperature = options.softcap, options.temperature
    return (
        architecture in MEASURED
        and hidden.dtype in (torch.bfloat16, torch.float16)
        and hidden.shape[0] >= FEWEST_TOKENS
        and hidden.shape[1] % 8 == 0  # TMA takes rows of whole 16 bytes
        and GRANULE <= weight.shape[0] < 2**31
        and options.tail_eps is None
        and (not softcap or (softcap / temperature <= LARGEST_CAP and bias is None))
    )


def tokens_kept(n_tokens: int, vocab_size: int, workspace_mib: float) -> int:
    """Tokens of a block whose e is kept: what the workspace holds, in even multiples of 256.

    2560 MiB hold 8,834 tokens at V = 151936.
    """
    most = int(workspace_mib * 2**20) // (2 * _row_elements(vocab_size)) // GRANULE * GRANULE or GRANULE
    blocks = -(-n_tokens // most) or 1
    return min(n_tokens, -(-n_tokens // blocks // GRANULE) * GRANULE)


def _row_elements(vocab_size: int) -> int:
    """Elements between two rows of e: TMA takes multiples of 16 bytes."""
    return -(-vocab_size // 8) * 8


class EpilogueStatistics(Engine):
    """See the top of this file. workspace_mib: for calls that do not say. `tiles` replaces the table's."""

    def __init__(self, workspace_mib: float = MOST_MIB, *, tiles: Tiles | None = None) -> None:
        self.workspace_mib, self.tiles = workspace_mib, tiles

    def statistics(self, inputs: HeadInputs, needs: NeedsGrad) -> tuple[Tensor, list[Tensor]]:
        """The table, and what `gradients` uses once; see `empty_saved`."""
        call, stats = self._call(inputs), empty_stats(inputs).zero_()
        saved = self.empty_saved(inputs, needs)
        first = 0
        if saved:
            kept, tiles, state = saved
            first = kept.shape[0]
        if first:
            block = call.forward(0, first, stats, kept[:, : call.V])
            tiles.copy_(block.tiles[0])
            state.copy_(block.state)
        for begin in range(first, call.N, LEAN_TOKENS):  # a block beyond the last token is an empty loop
            call.forward(begin, min(LEAN_TOKENS, call.N - begin), stats, None)
        return stats, saved

    def empty_saved(self, inputs: HeadInputs, needs: NeedsGrad) -> list[Tensor]:
        """e [K, V] of the first K tokens, which `gradients` overwrites, their tiles' maxima [tiles of V, K]
        and their state [4, K]."""
        if not self.saves(inputs, needs):
            return []
        hidden, V = inputs.hidden, inputs.vocab_size
        K = self._kept(inputs)
        return [
            hidden.new_empty(K, _row_elements(V)),
            hidden.new_empty(-(-V // self._tiles(inputs).bn), K, dtype=torch.float32),
            hidden.new_empty(4, K, dtype=torch.float32),
        ]

    def gradients(
        self,
        inputs: HeadInputs,
        stats: Tensor,
        saved: list[Tensor],
        coefficients: Tensor,
        needs: NeedsGrad,
    ) -> Gradients:
        """3 GEMMs for the tokens whose e was saved, 4 for the rest."""

        def of_tokens(_: Tensor, tokens: Tensor | slice) -> Tensor:
            return coefficients[:, tokens]

        call = self._call(inputs)
        K = self._kept(inputs)
        gradients = BlockGradients(call, needs, single=K == call.N)
        first = 0
        if K and saved:
            kept, tiles, state = saved
            block = call.gather(0, K, kept[:, : call.V], (tiles[None], state))
            gradients.add(block, stats, of_tokens)
            first = K
        _add_blocks(gradients, (K, first), torch.empty_like(stats), stats, of_tokens)
        return gradients.finish()

    def statistics_and_gradients(
        self, inputs: HeadInputs, token_coefficients: TokenCoefficients, needs: NeedsGrad
    ) -> tuple[Tensor, Gradients]:
        """3 GEMMs, 2 where the head is frozen."""
        call, stats = self._call(inputs), empty_stats(inputs).zero_()
        K = self._kept(inputs)
        K = K if needs.head else min(K, FROZEN_TOKENS)
        gradients = BlockGradients(call, needs, single=K == call.N)
        _add_blocks(gradients, (K, 0), stats, stats, token_coefficients)
        return stats, gradients.finish()

    def _kept(self, inputs: HeadInputs) -> int:
        workspace_mib = inputs.options.workspace_mib or self.workspace_mib
        return tokens_kept(inputs.hidden.shape[0], inputs.vocab_size, workspace_mib)

    def _tiles(self, inputs: HeadInputs) -> Tiles:
        if self.tiles is not None:
            return self.tiles
        return tiles_for(architecture(inputs.hidden.device.index), inputs.hidden.shape[1])

    def _call(self, inputs: HeadInputs) -> EpilogueCall:
        tiles = self._tiles(inputs)
        return EpilogueCall(inputs, tiles, tiles.per_sm * _multiprocessors(inputs.hidden.device))


def _add_blocks(
    gradients: BlockGradients,
    size_and_first: tuple[int, int],
    forward_stats: Tensor,
    stats: Tensor,
    coefficients: TokenCoefficients,
) -> None:
    """Add the gradients of all blocks from `first` on, through one memory for e.

    forward_stats: where the forward pass writes its statistics; stats: those that the gradients follow from.
    """
    call = gradients.call
    kept: Tensor | None = None
    for begin, rows in call.blocks(*size_and_first):
        if kept is None:
            kept = call.inputs.hidden.new_empty(rows, _row_elements(call.V))[:, : call.V]
        block = call.forward(begin, rows, forward_stats, kept[:rows])
        gradients.add(block, stats, coefficients)


@torch.compiler.assume_constant_result
def architecture(index: int | None) -> int:
    """The compute capability of a CUDA device, 90 for an H100."""
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # Triton's interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count
