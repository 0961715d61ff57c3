"""The engine whose logits GEMM has the statistics in its epilogue: logits never reach memory.

    forward    z = hidden weight^T in tiles; each tile's maximum and sums, and where gradients are needed
               e = 2^(z - r) in 16 bits, [K, V] for K tokens
    dlogits    one element of a row (linear/epilogue_triton.py says when a row needs a pass over e)
    dX, dW     one cuBLAS GEMM each

Bytes a logit beside the GEMMs' own: 0.1 where kept softmax moves 12 and token tiles more. Memory: the
gradients, 2 V bytes a kept token, and for K tokens 8 H bytes (their hidden states, dX in fp32) and 16 V / 256
bytes (the tiles' sums). Without gradients only the last two.

Errors: statistics are those of fp32 logits. e is rounded once, as dlogits are elsewhere; in bf16 the hidden
states are rounded again when they take over a row's factor in dW, so dW is off by sqrt(3) roundings where the
other engines are off by sqrt(2), 2.9e-3 of its norm against 2.4e-3 (predicted; PyTorch in bf16 2.4e-3 to
3.6e-3). The gradients of an entropy and the slope of a softcap take z from the rounded e, off by at most
0.002 nats; PyTorch's bf16 logits are off by 2^-9 |z|.

Ignored tokens enter no GEMM. Their number is known on the device and is asked for after the forward kernel
was queued: the host waits only for what was queued before. Under graph capture all tokens run, the ignored
ones with zero hidden states and coefficients.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..gemm import mm
from ..softmax.rows import Stat
from .engine import Engine, Gradients, TokenCoefficients, empty_gradients, empty_stats
from .inputs import HeadInputs, NeedsGrad

# MiB that e of K tokens may take: 8,834 tokens at V = 151936.
WORKSPACE_MIB = 2560.0
# Tokens of a block that keeps no e: its hidden states and sums take 0.5 GB at H = 4096, V = 151936.
LEAN_TOKENS = 32768
GRANULE = 256  # cuBLAS's GEMMs lose 5 to 8 % on other multiples of tokens (H200)
# softcap / temperature up to which e of all logits of a row fits bf16's exponents. With a bias beside it the
# forward kernel would spill.
LARGEST_CAP = 40.0


class Tiles(NamedTuple):
    """How forward_kernel runs."""

    bm: int = 128
    bn: int = 256
    bk: int = 64
    warps: int = 8
    stages: int = 4
    group: int = 8
    parts: int = 4
    flatten: bool = True
    branch: bool = True
    per_sm: int = 1


# By compute capability: (largest H, tiles). An architecture that no GPU has measured is not here, and
# `serves` says no.
TILES: dict[int, list[tuple[float, Tiles]]] = {90: [(math.inf, Tiles())]}


def tiles_for(architecture: int, hidden_size: int) -> Tiles:
    """The tiles of an architecture in TILES."""
    return next(tiles for largest, tiles in TILES[architecture] if hidden_size <= largest)


def serves(inputs: HeadInputs, architecture: int) -> bool:
    """Whether this engine can run a call on a GPU of this compute capability (90 for an H100)."""
    hidden, weight, _, bias, options = inputs
    H = hidden.shape[1]
    return (
        architecture in TILES
        and hidden.dtype in (torch.bfloat16, torch.float16)
        and options.tail_eps is None
        and H % 8 == 0  # TMA takes rows of whole 16 bytes
        and (not options.softcap or (options.softcap / options.temperature <= LARGEST_CAP and bias is None))
        and weight.shape[0] >= GRANULE
    )


def tokens_kept(n_tokens: int, vocab_size: int, workspace_mib: float | None) -> int:
    """Tokens of a block whose e is kept: what the workspace holds, in even multiples of 256."""
    mib = WORKSPACE_MIB if workspace_mib is None else workspace_mib
    most = int(mib * 2**20) // (2 * _leading(vocab_size)) // GRANULE * GRANULE or GRANULE
    blocks = -(-n_tokens // most) or 1
    return min(n_tokens, -(-n_tokens // blocks // GRANULE) * GRANULE)


def _leading(vocab_size: int) -> int:
    """Elements between two rows of e: TMA takes multiples of 16 bytes."""
    return -(-vocab_size // 8) * 8


class Block(NamedTuple):
    """Tokens order[first : first + rows] after the forward and the merge kernel."""

    first: int
    rows: int
    ids: Tensor  # [rows] int64
    gathered: Tensor  # [rows, H] hidden states
    kept: Tensor  # [rows, V] e, or of size 0
    tiles: Tensor  # [.., tiles of V, rows] fp32
    state: Tensor  # [4, rows] fp32


class Call:
    """One head call: what its blocks share, and their launches."""

    def __init__(self, inputs: HeadInputs, tiles: Tiles, programs: int, *, captured: bool) -> None:
        hidden, weight, ids, bias, options = inputs
        self.inputs, self.tiles, self.programs = inputs, tiles, programs
        self.weight = _for_tma(weight.to(hidden.dtype))
        self.bias = bias
        self.N = hidden.shape[0]
        self.V, self.H = weight.shape
        scale = options.logit_scale / options.temperature
        # z in base 2 is (x + bias) scale_out, or tanh((x + bias) scale_in ln 2 / 2) scale_out
        self.scale_in = 2 * options.logit_scale / (options.softcap * math.log(2)) if options.softcap else 0.0
        self.scale_out = (options.softcap / options.temperature if options.softcap else scale) / math.log(2)
        self.slope = scale
        self.entropy = self.mean = True
        self.one_reference = hidden.dtype != torch.float16 and not options.softcap
        self.kept_scale = 2.0**15 if hidden.dtype == torch.float16 else 1.0
        self.flags = {"HAS_BIAS": bias is not None, "HAS_SOFTCAP": options.softcap != 0}
        if captured:
            self.order = torch.arange(self.N, dtype=torch.int32, device=ids.device)
            self.count = torch.full((1,), self.N, dtype=torch.int32, device=ids.device)
        else:
            self.order = torch.empty(self.N, dtype=torch.int32, device=ids.device)
            self.count = torch.empty(1, dtype=torch.int32, device=ids.device)
            _kernels().compact_kernel[(1,)](ids, self.order, self.count, self.N, BLOCK=4096, num_warps=8)
        self.how_many = (lambda: self.N) if captured else _later(self.count)

    def tokens(self, block: Block, rows: int) -> Tensor | slice:
        """The indices of a block's first tokens."""
        if self.how_many() == self.N:
            return slice(block.first, block.first + rows)
        return self.order[block.first : block.first + rows].long()

    def forward(self, first: int, rows: int, stats: Tensor, kept: Tensor | None) -> Block:
        """Statistics of a block into the table, and e into kept [rows, V]."""
        block = self.gather(first, rows, self.inputs.hidden.new_empty(0) if kept is None else kept)
        kernels, tiles = _kernels(), self.tiles
        e = block.gathered if kept is None else kept  # a descriptor must have memory, even if nobody writes
        col_tiles = block.tiles.shape[1]
        kernels.forward_kernel[(self.programs,)](
            _descriptor(block.gathered, tiles.bm, tiles.bk),
            _descriptor(self.weight, tiles.bn, tiles.bk),
            _descriptor(e, tiles.bm, tiles.bn // tiles.parts),
            block.ids, self.bias, self.count, block.state, block.tiles,
            first, rows, self.V, self.H, self.scale_in, self.scale_out, **self.flags,
            ENTROPY=self.entropy, MEAN=self.mean, KEEP=kept is not None,
            KEPT_SCALE=self.kept_scale, BM=tiles.bm, BN=tiles.bn, BK=tiles.bk, GROUP=tiles.group,
            PARTS=tiles.parts, PROGRAMS=self.programs, FLATTEN=tiles.flatten, BRANCH=tiles.branch,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        kernels.merge_kernel[(-(-rows // 32),)](
            block.tiles, block.ids, self.order, self.count, stats, block.state,
            first, rows, self.N, self.V, col_tiles, ENTROPY=self.entropy, MEAN=self.mean, ROWS=32, TILES=32,
        )  # fmt: skip
        return block

    def gather(
        self, first: int, rows: int, kept: Tensor, saved: tuple[Tensor, Tensor] | None = None
    ) -> Block:
        """A block's hidden states; `saved`: its tiles and state, when the forward kernel ran before."""
        hidden, _, ids, _, _ = self.inputs
        col_tiles = -(-self.V // self.tiles.bn)
        gathered = torch.empty(rows, self.H, dtype=hidden.dtype, device=hidden.device)
        block_ids = torch.empty(rows, dtype=torch.int64, device=ids.device)
        tiles, state = (
            saved
            if saved is not None
            else (
                torch.empty(4, col_tiles, rows, dtype=torch.float32, device=ids.device),
                torch.empty(4, rows, dtype=torch.float32, device=ids.device),
            )
        )
        _kernels().gather_kernel[(-(-rows // 32),)](
            hidden, self.weight, ids, self.bias, self.order, self.count, gathered, block_ids, state,
            first, rows, self.V, self.H, *hidden.stride(), self.weight.stride(0), self.V // 2,
            self.scale_in, self.scale_out, **self.flags,
            ONE_REFERENCE=self.one_reference, NEW=saved is None, BM=32, SAMPLE=64, BK=64,
        )  # fmt: skip
        return Block(first, rows, block_ids, gathered, kept, tiles, state)

    def dlogits(
        self, block: Block, rows: int, logp: Tensor, coefficients: Tensor, needs: NeedsGrad
    ) -> Tensor:
        """Turn e of a block's first tokens into dlogits; the factor [rows] of each row."""
        row_scale = torch.empty(rows, dtype=torch.float32, device=logp.device)
        bn = self.tiles.bn
        coefficients = coefficients.contiguous()
        _kernels().dlogits_kernel[(rows,)](
            block.kept, block.tiles, block.state, block.ids, logp, self.order, coefficients,
            block.gathered, row_scale, block.first, block.rows, self.V, self.H, block.kept.stride(0),
            coefficients.shape[1], self.slope, self.scale_out, HAS_SOFTCAP=self.flags["HAS_SOFTCAP"],
            ONE_REFERENCE=self.one_reference, SCALE_HIDDEN=needs.head, KEPT_SCALE=self.kept_scale,
            BN=bn, TILES=max(1, 4096 // bn), BLOCK=1024, num_warps=8,
        )  # fmt: skip
        return row_scale

    def blocks(self, size: int, first: int = 0) -> Iterator[tuple[int, int]]:
        """(first token, tokens) of each block; a second block asks how many tokens there are."""
        end = self.N
        while first < end:
            yield first, min(size, end - first)
            first += size
            if first < end:
                end = self.how_many()


class Sums:
    """The gradients of a call, a block at a time."""

    def __init__(self, call: Call, needs: NeedsGrad, *, blocks: int) -> None:
        self.call, self.needs, self.blocks = call, needs, blocks
        self.out = empty_gradients(call.inputs, needs)
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.cleared = False

    def add(self, block: Block, rows: int, logp: Tensor, coefficients: Tensor) -> None:
        """Add a block's first tokens."""
        call, needs = self.call, self.needs
        if needs.hidden and not self.cleared and call.how_many() < call.N:
            self.out.hidden.zero_()
        self.cleared = True
        if rows == 0:
            return
        row_scale = call.dlogits(block, rows, logp, coefficients, needs)
        grad, x = block.kept[:rows], block.gathered[:rows]
        if needs.hidden:
            dtype = torch.float32 if call.one_reference else x.dtype
            dx = torch.empty(rows, call.H, dtype=dtype, device=x.device)
            mm(grad, call.weight, dx)
            _kernels().scatter_kernel[(rows,)](
                dx, row_scale, call.order, self.out.hidden, block.first, call.H,
                SCALED=call.one_reference, BLOCK=1024,
            )  # fmt: skip
            del dx
        if needs.weight:
            self._add_weight(grad, x)
        if needs.bias:
            self._add_bias(grad, row_scale)

    def _add_weight(self, grad: Tensor, x: Tensor) -> None:
        if self.blocks == 1:
            mm(grad.t(), x, self.out.weight)
            self.weight = self.out.weight
            return
        first = self.weight is None
        if self.weight is None:
            self.weight = torch.empty(self.call.V, self.call.H, dtype=torch.float32, device=x.device)
        mm(grad.t(), x, self.weight, add=not first)

    def _add_bias(self, grad: Tensor, row_scale: Tensor) -> None:
        """Column sums by a GEMM, whose order is fixed. The factors in two parts, so that none of their digits
        is lost."""
        thin = torch.zeros(grad.shape[0], 8, dtype=grad.dtype, device=grad.device)
        if self.call.one_reference:
            thin[:, 0] = row_scale
            thin[:, 1] = row_scale - thin[:, 0].float()
        else:
            thin[:, 0] = 1
        sums = torch.empty(self.call.V, 8, dtype=torch.float32, device=grad.device)
        mm(grad.t(), thin, sums)
        total = sums[:, 0] + sums[:, 1]
        self.bias = total if self.bias is None else self.bias + total

    def finish(self) -> Gradients:
        """The gradients in the dtypes of the inputs."""
        hidden, weight, bias = self.out
        if self.needs.hidden and not self.cleared:
            hidden.zero_()
        if self.needs.weight and self.weight is not weight:
            weight.zero_() if self.weight is None else weight.copy_(self.weight)
        if self.needs.bias:
            bias.zero_() if self.bias is None else bias.copy_(self.bias)
        return self.out


class EpilogueStatistics(Engine):
    """See the top of this file. `tiles`: instead of the table's, for tests and `bench.tune`."""

    def __init__(self, tiles: Tiles | None = None) -> None:
        self.tiles = tiles

    def statistics(self, inputs: HeadInputs, needs: NeedsGrad) -> tuple[Tensor, list[Tensor]]:
        """The table, and what `gradients` uses once: e of the first K tokens, their sums, and whether it was
        used."""
        call, stats, saved = self._call(inputs), _zeros(empty_stats(inputs)), self.empty_saved(inputs, needs)
        first = 0
        if saved:
            kept, tiles, state, used = saved
            first = kept.shape[0]
            used.fill_(False)
            if first:
                block = call.forward(0, first, stats, _rows(kept, call.V))
                tiles.copy_(block.tiles[0])
                state.copy_(block.state)
        for begin in range(first, call.N, LEAN_TOKENS):  # blocks beyond the last token are empty loops
            call.forward(begin, min(LEAN_TOKENS, call.N - begin), stats, None)
        return stats, saved

    def empty_saved(self, inputs: HeadInputs, needs: NeedsGrad) -> list[Tensor]:
        """[K, V] e, [tiles, K] the tiles' maxima, [4, K], and a bool in host memory."""
        if not any(needs):
            return []
        hidden = inputs.hidden
        V = inputs.vocab_size
        K = tokens_kept(hidden.shape[0], V, inputs.options.workspace_mib)
        col_tiles = -(-V // self._tiles(inputs).bn)
        return [
            hidden.new_empty(K, _leading(V)),
            hidden.new_empty(col_tiles, K, dtype=torch.float32),
            hidden.new_empty(4, K, dtype=torch.float32),
            torch.empty(1, dtype=torch.bool),
        ]

    def gradients(
        self,
        inputs: HeadInputs,
        stats: Tensor,
        saved: list[Tensor],
        coefficients: Tensor,
        needs: NeedsGrad,
    ) -> Gradients:
        """3 GEMMs for the tokens whose e was kept, 4 for the rest; a second call takes 4 for all."""
        call = self._call(inputs)
        K = tokens_kept(call.N, call.V, inputs.options.workspace_mib)
        sums = Sums(call, needs, blocks=-(-call.N // K) if K else 1)
        scratch = torch.empty_like(stats)
        first = 0
        if saved and K and not saved[3].item():
            kept, tiles, state, used = saved
            used.fill_(True)
            block = call.gather(0, K, _rows(kept, call.V), (tiles[None], state))
            self._add(call, sums, block, stats, lambda tokens: coefficients[:, tokens])
            first = K
        memory: Tensor | None = None
        for begin, rows in call.blocks(K, first):
            memory = self._kept(call, rows) if memory is None else memory
            block = call.forward(begin, rows, scratch, memory[:rows])
            self._add(call, sums, block, stats, lambda tokens: coefficients[:, tokens])
        return sums.finish()

    def statistics_and_gradients(
        self, inputs: HeadInputs, token_coefficients: TokenCoefficients, needs: NeedsGrad
    ) -> tuple[Tensor, Gradients]:
        """3 GEMMs, a block of K tokens at a time."""
        call, stats = self._call(inputs), _zeros(empty_stats(inputs))
        K = tokens_kept(call.N, call.V, inputs.options.workspace_mib)
        sums = Sums(call, needs, blocks=-(-call.N // K) if K else 1)
        kept: Tensor | None = None
        for begin, rows in call.blocks(K):
            kept = self._kept(call, rows) if kept is None else kept
            block = call.forward(begin, rows, stats, kept[:rows])
            self._add(call, sums, block, stats, lambda tokens: token_coefficients(stats[:, tokens], tokens))
        return stats, sums.finish()

    @staticmethod
    def _add(
        call: Call,
        sums: Sums,
        block: Block,
        stats: Tensor,
        coefficients: Callable[[Tensor | slice], Tensor],
    ) -> None:
        rows = max(0, min(block.rows, call.how_many() - block.first))
        tokens = call.tokens(block, rows)
        sums.add(block, rows, stats[Stat.LOGP], coefficients(tokens))

    @staticmethod
    def _kept(call: Call, rows: int) -> Tensor:
        hidden = call.inputs.hidden
        return _rows(hidden.new_empty(rows, _leading(call.V)), call.V)

    def _tiles(self, inputs: HeadInputs) -> Tiles:
        if self.tiles is not None:
            return self.tiles
        return tiles_for(_architecture(inputs.hidden.device), inputs.hidden.shape[1])

    def _call(self, inputs: HeadInputs) -> Call:
        ids = inputs.ids
        captured = ids.is_cuda and torch.cuda.is_current_stream_capturing()
        tiles = self._tiles(inputs)
        return Call(inputs, tiles, tiles.per_sm * _programs(ids.device), captured=captured)


EPILOGUE = EpilogueStatistics()


@functools.cache
def _architecture(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # Triton's interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count


def _zeros(table: Tensor) -> Tensor:
    return table.zero_()


def _rows(kept: Tensor, vocab_size: int) -> Tensor:
    return kept[:, :vocab_size]


def _for_tma(weight: Tensor) -> Tensor:
    """The weight, or a copy if TMA cannot read it: whole rows, 16 bytes apart."""
    aligned = weight.data_ptr() % 16 == 0 and weight.stride(0) * weight.element_size() % 16 == 0
    return (
        weight if weight.stride(1) == 1 and aligned else weight.clone(memory_format=torch.contiguous_format)
    )


def _descriptor(matrix: Tensor, rows: int, columns: int):
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


def _kernels():
    from . import epilogue_triton  # here, because triton is absent on macOS and Windows

    return epilogue_triton


def _later(count: Tensor) -> Callable[[], int]:
    """A function that tells the count; on a GPU it waits for no more than what was queued before this call."""
    if not count.is_cuda:
        return functools.cache(lambda: int(count))
    host = torch.empty(1, dtype=torch.int32, pin_memory=True)
    host.copy_(count, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    @functools.cache
    def how_many() -> int:
        copied.synchronize()
        return int(host[0])

    return how_many
