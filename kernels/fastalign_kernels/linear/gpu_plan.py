"""How a head call runs on a GPU: the engine, tokens of a tile and of a block, columns of a slice.

Pure functions of shapes, dtypes, gradients and the workspace.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

LOW_PRECISION = (torch.bfloat16, torch.float16)
# Tokens of a tile of logits. On an H200 cuBLAS is 5 to 8 % slower at numbers that are no multiple of 256.
TILES = (1024, 768, 512, 256)
GRANULE = 256  # blocks of tokens and slices of the vocabulary are multiples of it
# A block of B tokens reads and writes dW's fp32 sum, 8 V H bytes. A fourth GEMM is 2 N H V flops. At 170
# flops a byte (an H200's 680 TFLOP/s and 4 TB/s) N / B blocks cost more than the GEMM if B is below 680.
FEWEST_KEPT = 768
# e^-SMALLEST_LOGP is about the smallest P that is kept with some of its digits.
SMALLEST_LOGP = {torch.bfloat16: 85.0, torch.float16: 26.0}
MOST_MIB = 2560.0
# Where all of what is kept between the passes fits in this, a fourth GEMM for the rest would cost more: at
# 16384 tokens and V 151936 it is 4748 MiB, and half of it with dW's fp32 sum beside it 3561.
MOST_SAVED_MIB = 5120.0
CARD_SHARE = 16


class TileSizes(NamedTuple):
    """Tokens of a tile of logits, tokens of a block whose dlogits are in memory together, bytes of both."""

    tile: int
    block: int
    bytes: int


class GpuCall(NamedTuple):
    """What the plan depends on."""

    n_tokens: int  # N, ignored ones counted
    hidden_size: int  # H
    vocab_size: int  # V
    dtype: torch.dtype  # of the hidden states
    workspace_mib: float
    hidden_grad: bool
    head_grad: bool  # of weight or bias
    tail: bool = False  # tail_eps is given

    @property
    def grad(self) -> bool:
        return self.hidden_grad or self.head_grad

    @property
    def tile_bytes(self) -> int:
        """Bytes of a logit in a tile: fp32, since z in bf16 would be off by 0.03 nats at |z| = 20."""
        return 4

    @property
    def kept_bytes(self) -> int:
        """Bytes of a dlogit beside its logit; 0 in fp32, where it replaces the logit."""
        return 2 if self.dtype in LOW_PRECISION else 0

    @property
    def room(self) -> int:
        """Bytes of the workspace for each column of the vocabulary."""
        return int(self.workspace_mib * 2**20) // self.vocab_size


def gpu_workspace_mib(card_bytes: int | None) -> float:
    """The default workspace of a card with that much memory: a sixteenth, at most 2.5 GiB (None: that)."""
    return MOST_MIB if card_bytes is None else min(MOST_MIB, card_bytes / CARD_SHARE / 2**20)


def gpu_saved_mib(card_bytes: int | None) -> float:
    """The default for what is kept between the passes if all of it fits: a sixteenth, at most 5 GiB."""
    return MOST_SAVED_MIB if card_bytes is None else min(MOST_SAVED_MIB, card_bytes / CARD_SHARE / 2**20)


def select_engine(call: GpuCall) -> str:
    """token_tiles, kept_softmax or vocab_slices.

    Token tiles serve fp64 and the tail. Kept softmax serves all else if the workspace holds a tile of 256
    tokens and, with a gradient of the head, blocks of FEWEST_KEPT tokens or all tokens. With less memory the
    vocabulary is processed in slices, or by token tiles if not even a slice of 256 columns fits.
    """
    if call.dtype == torch.float64 or (call.tail and call.grad):
        return "token_tiles"
    sizes = tile_sizes(call)
    if sizes.block >= min(FEWEST_KEPT if call.head_grad else TILES[-1], call.n_tokens):
        return "kept_softmax"
    if slice_width(call):
        return "vocab_slices"
    return "token_tiles"


def tile_sizes(call: GpuCall, *, even: bool = True) -> TileSizes:
    """Sizes for kept softmax.

    Without a gradient of the head a block is one tile. With it a block holds all tokens if it can. Otherwise
    as few blocks as possible are made, because each reads and writes dW's fp32 sum. Then the tile is as large
    as possible.

    even: blocks are of about the same size. Else the first is as large as possible: P is kept for it.
    """
    N, room, tile_bytes, kept_bytes = call.n_tokens, call.room, call.tile_bytes, call.kept_bytes
    if not call.head_grad:
        per_token = tile_bytes + (kept_bytes if call.grad else 0)
        return _sizes(call, _even(N, _largest_tile(room // per_token)), None)
    if not kept_bytes:
        block = max(1, room // tile_bytes)
        block = _even(N, block) if even else min(N, block)
        return _sizes(call, _even(block, TILES[0]), block)
    best: tuple[int, int, int] | None = None  # blocks, tile, block
    for tile in TILES:
        block = (room - tile * tile_bytes) // kept_bytes // GRANULE * GRANULE
        if block >= tile and (best is None or -(-N // block) < best[0]):
            best = (-(-N // block), tile, block)
    if best is None:  # no tile of 256 fits: as much as does
        return _sizes(call, min(N, room // (tile_bytes + kept_bytes)), None)
    _, tile, block = best
    return _sizes(call, _even(N, tile), _even(N, block) if even else min(N, block))


def slice_width(call: GpuCall) -> int:
    """Columns of a vocabulary slice; 0 if the workspace does not hold GRANULE columns of all tokens.

    dX in 16 bits is made of an fp32 sum when the slices are gone. What the sum takes more than dX comes out
    of the workspace.
    """
    per_column = max(1, call.n_tokens) * (call.tile_bytes + (call.kept_bytes if call.grad else 0))
    sums = 2 * call.n_tokens * call.hidden_size if call.hidden_grad and call.kept_bytes else 0
    room = (int(call.workspace_mib * 2**20) - sums) // per_column // GRANULE * GRANULE
    return max(0, min(room, call.vocab_size))


def _sizes(call: GpuCall, tile: int, block: int | None) -> TileSizes:
    """With block None it is the tile."""
    tile = max(1, tile)
    block = tile if block is None else max(1, block)
    kept = call.kept_bytes if call.grad else 0
    numbers = tile * call.tile_bytes + block * kept if kept else max(tile, block) * call.tile_bytes
    return TileSizes(min(tile, block), block, numbers * call.vocab_size)


def _even(n_tokens: int, most: int) -> int:
    """The size of even blocks of at most `most` tokens: a multiple of GRANULE, or all tokens."""
    blocks = -(-n_tokens // most) or 1
    if blocks == 1:
        return n_tokens
    even = -(-n_tokens // blocks)
    return min(most, -(-even // GRANULE) * GRANULE)


def _largest_tile(room: int) -> int:
    return next((tile for tile in TILES if tile <= room), max(1, min(room, TILES[-1])))


def keeps_softmax(dtype: torch.dtype, vocab_size: int, softcap: float, temperature: float) -> bool:
    """Whether P in 16 bits holds what any gradient needs.

    Under a softcap the slope of a logit is computed from its P, which must not vanish for the smallest logit
    that the cap allows.
    """
    if not softcap or dtype not in SMALLEST_LOGP:
        return True
    return 2 * softcap / temperature + math.log(vocab_size) < SMALLEST_LOGP[dtype]
