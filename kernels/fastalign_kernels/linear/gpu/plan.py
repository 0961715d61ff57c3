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

# The engine `epilogue` (epilogue.py): compute capabilities on which a GPU has measured it.
EPILOGUE_MEASURED = (90,)
# For dW its hidden states are multiplied by their row's factor, which rounds them once more than other
# engines do. On an H200 (2026-11-27) dW was within twice PyTorch's error at 253 to 1,024 tokens, but not in
# the tests of a few dozen tokens, where one token decides an element. With so few tokens the launches
# decide the time anyway.
FEWEST_EPILOGUE_TOKENS = 1024
# Columns of a slice of `epilogue_slices`. Each slice reads and writes dX's fp32 sum, 8 N H bytes: at 4.2 TB/s
# and 680 TFLOP/s the time of the GEMM of 650 columns.
FEWEST_COLUMNS = 1024
# softcap / temperature up to which e of all logits of a row fits bf16's exponents. With a bias beside it the
# forward kernel would spill.
LARGEST_CAP = 40.0
TILE_COLUMNS = 256  # of the engine's forward kernel
# A block where the head needs no gradient: at least so many tokens, and what so many MiB hold of e. dX is
# finished block by block, so a larger one saves launches alone: at 8192 x 576 x 49152 four blocks took an
# H200 1.54 times two bare GEMMs, because its host was slower than the blocks.
FROZEN_TOKENS, FROZEN_MIB = 2048, 640


# Of a screen's block without gradients, whose e is in memory too.
UNKEPT_TOKENS = 2048
# Hidden size from which a screen is used. Without gradients it is predicted to take 0.83 to 0.99 of an exact
# pass at H 4096, and 0.98 to 1.13 at H 2048 (bench/reports/tail_roofline.py): what it reads and writes beside
# its products does not grow with H.
LEAST_SCREENED_HIDDEN = 3072


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
    cap: float = 0.0  # softcap / temperature; 0: no softcap
    bias: bool = False
    architecture: int = 0  # compute capability, 90 for an H100; 0: not known
    saved_mib: float | None = None  # if it holds all that is kept between the passes; None: workspace_mib
    low_logits: bool = False  # logits are bf16, and the gradient overwrites them
    lora_rank: int = 0  # r of a LoRA adapter; 0: none
    lora_grad: bool = False  # of its thin product
    screen: bool = False  # logits are screened

    @property
    def grad(self) -> bool:
        return self.hidden_grad or self.head_grad or self.lora_grad

    @property
    def low_precision(self) -> bool:
        """Whether hidden states and weight are in 16 bits."""
        return self.dtype in LOW_PRECISION

    @property
    def tile_bytes(self) -> int:
        """Bytes of a logit in a tile: fp32 unless bf16, off by 0.03 nats at |z| = 20, is asked for."""
        return 2 if self.low_logits else 4

    @property
    def kept_bytes(self) -> int:
        """Bytes of a dlogit beside its logit; 0 where it replaces the logit."""
        return 2 if self.low_precision and not self.low_logits else 0

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
    """The engine: token_tiles, kept_softmax, epilogue, tail, screen, vocab_slices or epilogue_slices.

    Token tiles serve fp64. A screen runs as `screen` from LEAST_SCREENED_HIDDEN on, where `epilogue` would
    serve the call without it; else all logits are exact. The tail runs as `tail` where `epilogue` would serve
    without it, else in token tiles. Kept softmax serves all else if the workspace holds a tile of 256 tokens
    and, with a gradient of the head, blocks of FEWEST_KEPT tokens or all tokens. With less memory the
    vocabulary is processed in slices, or by token tiles if not even a slice of 256 columns fits. `epilogue`
    takes the place of kept softmax where it serves, and `epilogue_slices` that of the slices; they do not
    serve LoRA on the head.
    """
    if call.dtype == torch.float64:
        return "token_tiles"
    if call.screen:
        unscreened = call._replace(screen=False)
        exact = select_engine(unscreened._replace(tail=False))
        pays = call.hidden_size >= LEAST_SCREENED_HIDDEN and exact == "epilogue"
        return "screen" if pays and not screen_refusal(call) else select_engine(unscreened)
    if call.tail:
        exact = select_engine(call._replace(tail=False))
        return exact if not call.grad else "tail" if exact == "epilogue" else "token_tiles"
    sizes = tile_sizes(call)
    if sizes.block >= min(FEWEST_KEPT if call.head_grad else TILES[-1], call.n_tokens):
        return "epilogue" if epilogue_serves(call) else "kept_softmax"  # an H200 was 5 to 14 % faster with it
    if call.grad and epilogue_serves(call) and epilogue_slice_width(call) >= FEWEST_COLUMNS:
        return "epilogue_slices"
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


def saved_sizes(call: GpuCall) -> TileSizes:
    """Sizes for kept softmax where P is kept between the passes: as if all gradients were needed, since
    without the head's a block would be a tile, but here all tokens may be kept."""
    call = call._replace(hidden_grad=True, head_grad=True)
    if call.saved_mib is not None:
        sizes = tile_sizes(call._replace(workspace_mib=call.saved_mib), even=False)
        if sizes.block >= call.n_tokens:
            return sizes
    return tile_sizes(call, even=False)


def epilogue_serves(call: GpuCall) -> bool:
    """Whether the engine `epilogue` can run a call on its GPU."""
    return (
        call.architecture in EPILOGUE_MEASURED
        and call.low_precision
        and call.n_tokens >= FEWEST_EPILOGUE_TOKENS
        and call.hidden_size % 8 == 0  # TMA takes rows of whole 16 bytes
        and GRANULE <= call.vocab_size < 2**31
        and not call.tail
        and not call.low_logits
        and not call.lora_rank  # its kernel has one product: a second one needs the logits in memory
        and (not call.cap or (call.cap <= LARGEST_CAP and not call.bias))
    )


def screen_refusal(call: GpuCall) -> str:
    """Why a GPU cannot screen such calls, however many tokens they have; empty if it can."""
    if not call.low_precision:
        return f"a GPU has 8-bit products of bf16 and fp16 factors alone, and these are {call.dtype}"
    if call.architecture not in EPILOGUE_MEASURED:
        measured = " and ".join(map(str, EPILOGUE_MEASURED))
        return (
            f"8-bit products are for GPUs of compute capability {measured}, and this one has "
            f"{call.architecture}"
        )
    if call.hidden_size % 8 or not GRANULE <= call.vocab_size < 2**31:
        return (
            f"a GPU screens heads with H a multiple of 8 and V from {GRANULE} on, and this one has H "
            f"{call.hidden_size} and V {call.vocab_size}"
        )
    if call.cap or call.bias:
        return f"a head with a {'softcap' if call.cap else 'bias'} has exact logits alone on a GPU"
    if call.grad and not call.tail:
        return "on a GPU a screen saves nothing in training without tail_eps: give that too"
    return ""


def gpu_coded_bytes(rows: int, hidden_size: int) -> int:
    """Bytes of a factor's codes on a GPU (screen_codes.py)."""
    return rows * (-(-hidden_size // 64) * 64 + 140)


def epilogue_tokens(call: GpuCall) -> int:
    """Tokens of a block of `epilogue`: what the workspace holds of e, in even multiples of 256.

    2560 MiB hold 8,834 tokens at V = 151936.
    """
    row_bytes = 2 * row_elements(call.vocab_size)
    most = int(call.workspace_mib * 2**20) // row_bytes // GRANULE * GRANULE
    if not call.head_grad and call.hidden_grad:
        most = min(most, max(FROZEN_TOKENS, FROZEN_MIB * 2**20 // row_bytes // GRANULE * GRANULE))
    blocks = -(-call.n_tokens // (most or GRANULE)) or 1
    return min(call.n_tokens, -(-call.n_tokens // blocks // GRANULE) * GRANULE)


def epilogue_saved(call: GpuCall) -> int:
    """Tokens whose e is kept between the passes: all, if they fit `saved_mib`."""
    call = call._replace(hidden_grad=True, head_grad=True)
    all_fit = call._replace(workspace_mib=call.workspace_mib if call.saved_mib is None else call.saved_mib)
    return call.n_tokens if epilogue_tokens(all_fit) == call.n_tokens else epilogue_tokens(call)


def epilogue_slice_width(call: GpuCall) -> int:
    """Columns of a slice of `epilogue_slices`.

    0 if the workspace does not hold GRANULE columns of all tokens, or if the engine does not serve: it takes
    bf16, whose exponents hold every P, and no softcap, whose slope differs by column.

    Beside a slice the workspace holds the hidden states, gathered and for dW scaled, and what dX's fp32 sum
    takes more than dX.
    """
    if call.dtype == torch.float16 or call.cap:
        return 0
    N, H = max(1, call.n_tokens), call.hidden_size
    fixed = 2 * N * H * (1 + call.head_grad + call.hidden_grad)
    per_column = 2 * N + 8 * N // TILE_COLUMNS  # e, and two numbers of each tile
    room = (int(call.workspace_mib * 2**20) - fixed) // per_column // GRANULE * GRANULE
    return max(0, min(room, call.vocab_size))


def row_elements(vocab_size: int) -> int:
    """Elements between two rows of e: TMA takes multiples of 16 bytes."""
    return -(-vocab_size // 8) * 8


def slice_width(call: GpuCall) -> int:
    """Columns of a vocabulary slice; 0 if the workspace does not hold GRANULE columns of all tokens.

    dX in 16 bits is made of an fp32 sum when the slices are gone. What the sum takes more than dX comes out
    of the workspace.
    """
    per_column = max(1, call.n_tokens) * (call.tile_bytes + (call.kept_bytes if call.grad else 0))
    sums = 2 * call.n_tokens * call.hidden_size if call.hidden_grad and call.low_precision else 0
    room = (int(call.workspace_mib * 2**20) - sums) // per_column // GRANULE * GRANULE
    return max(0, min(room, call.vocab_size))


def _sizes(call: GpuCall, tile: int, block: int | None) -> TileSizes:
    """Sizes of a tile and a block of tokens, with their bytes; block None: a block is a tile."""
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
