"""One call of the engine in linear/epilogue.py: its blocks of tokens and their launches."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..gemm import mm
from .engine import Gradients, TokenCoefficients, empty_gradients
from .inputs import HeadInputs, NeedsGrad
from .token_losses import TokenCrossEntropy


class Tiles(NamedTuple):
    """How forward_kernel runs."""

    bm: int = 128
    bn: int = 256
    bk: int = 64
    warps: int = 8
    stages: int = 4
    group: int = 8  # row tiles that share columns of the weight in L2
    parts: int = 4  # 2 or 4 of a tile, which the epilogue takes one after the other
    branch: bool = True  # look for targets only in parts that hold one
    flatten: bool = True  # load the next tile's first blocks during the epilogue
    per_sm: int = 1  # programs


class Scales(NamedTuple):
    """The head's numbers as the kernels take them: z in base 2 is (x + bias) outer, or under a softcap
    tanh((x + bias) inner ln 2 / 2) outer."""

    inner: float
    outer: float
    slope: float  # dz/dx in nats, without a softcap

    @classmethod
    def of(cls, inputs: HeadInputs) -> Scales:
        """Of a call's options."""
        logit_scale, softcap, temperature, *_ = inputs.options
        slope = logit_scale / temperature
        if softcap:
            return cls(
                2 * logit_scale / (softcap * math.log(2)), softcap / (temperature * math.log(2)), slope
            )
        return cls(0.0, slope / math.log(2), slope)


class Block(NamedTuple):
    """Tokens order[first : first + rows] after the forward and the merge kernel."""

    first: int
    rows: int
    ids: Tensor  # [rows] int64
    hidden: Tensor  # [rows, H], gathered
    kept: Tensor  # [rows, V] e, or of size 0
    tiles: Tensor  # [.., tiles of V, rows] fp32
    state: Tensor  # [4, rows] fp32


class EpilogueCall:
    """What the blocks of a call share, and the launches of a block.

    order [N] holds the tokens that are not ignored first; `how_many()` waits for their number.
    """

    def __init__(self, inputs: HeadInputs, tiles: Tiles, programs: int) -> None:
        hidden, weight, ids, bias, options = inputs
        self.inputs, self.tiles, self.programs = inputs, tiles, programs
        self.scales = Scales.of(inputs)
        self.weight = _readable_by_tma(weight.to(hidden.dtype))
        self.N, (self.V, self.H) = hidden.shape[0], weight.shape
        self.flags = {"HAS_BIAS": bias is not None, "HAS_SOFTCAP": options.softcap != 0}
        # One reference a row needs bf16's exponents, and a softcap's slope differs by column.
        self.one_reference = hidden.dtype != torch.float16 and not options.softcap
        self.kept_scale = 2.0**15 if hidden.dtype == torch.float16 else 1.0
        self.statistics = {"ENTROPY": not options.lean, "MEAN": not options.lean}
        self.order, self.count, self.how_many = _compacted(ids)

    def tokens(self, block: Block, rows: int) -> Tensor | slice:
        """The indices of a block's first tokens."""
        if self.how_many() == self.N:
            return slice(block.first, block.first + rows)
        return self.order[block.first : block.first + rows].long()

    def blocks(self, size: int, first: int = 0) -> Iterator[tuple[int, int]]:
        """(first token, tokens) of each block from `first` on; a second block waits for the number of
        tokens."""
        end = self.N
        while first < end:
            yield first, min(size, end - first)
            first += size
            if first < end:
                end = self.how_many()

    def forward(self, first: int, rows: int, stats: Tensor, kept: Tensor | None) -> Block:
        """Statistics of a block into the table [7, N], and e into kept [rows, V]."""
        hidden, _, _, bias, _ = self.inputs
        block = self.gather(first, rows, hidden.new_empty(0) if kept is None else kept)
        tiles, kernels = self.tiles, _kernels()
        kernels.forward_kernel[(self.programs,)](
            _descriptor(block.hidden, tiles.bm, tiles.bk),
            _descriptor(self.weight, tiles.bn, tiles.bk),
            # a descriptor needs memory, even if nobody writes
            _descriptor(block.hidden if kept is None else kept, tiles.bm, tiles.bn // tiles.parts),
            block.ids, bias, self.count, block.state, block.tiles,
            first, rows, self.V, self.H, self.scales.inner, self.scales.outer,
            **self.flags, **self.statistics,
            KEEP=kept is not None, KEPT_SCALE=self.kept_scale, BM=tiles.bm, BN=tiles.bn, BK=tiles.bk,
            GROUP=tiles.group, PARTS=tiles.parts, PROGRAMS=self.programs, FLATTEN=tiles.flatten,
            BRANCH=tiles.branch,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        kernels.merge_kernel[(-(-rows // 32),)](
            block.tiles, block.ids, self.order, self.count, stats, block.state,
            first, rows, self.N, self.V, block.tiles.shape[1], **self.statistics, ROWS=32, TILES=32,
        )  # fmt: skip
        return block

    def gather(
        self, first: int, rows: int, kept: Tensor, saved: tuple[Tensor, Tensor] | None = None
    ) -> Block:
        """A block before the forward kernel, or with `saved` tiles and state after it."""
        hidden, _, ids, bias, _ = self.inputs
        block_ids = torch.empty(rows, dtype=torch.int64, device=ids.device)
        gathered = torch.empty(rows, self.H, dtype=hidden.dtype, device=hidden.device)
        if saved is None:
            planes = 2 + sum(self.statistics.values())
            tiles = torch.empty(
                planes, -(-self.V // self.tiles.bn), rows, dtype=torch.float32, device=ids.device
            )
            state = torch.empty(4, rows, dtype=torch.float32, device=ids.device)
        else:
            tiles, state = saved
        _row_kernels().gather_kernel[(-(-rows // 32),)](
            hidden, self.weight, ids, bias, self.order, self.count, gathered, block_ids, state,
            first, rows, self.V, self.H, *hidden.stride(), self.weight.stride(0), self.V // 2,
            self.scales.inner, self.scales.outer, **self.flags,
            ONE_REFERENCE=self.one_reference, NEW=saved is None, BM=32, SAMPLE=64, BK=64,
        )  # fmt: skip
        return Block(first, rows, block_ids, gathered, kept, tiles, state)

    def dlogits(
        self, block: Block, rows: int, stats: Tensor, coefficients: TokenCoefficients, needs: NeedsGrad
    ) -> Tensor:
        """Turn e of a block's first tokens into dlogits / row_scale, and x into row_scale x if dW needs it.

        stats: [7, N]. Returns row_scale [rows].
        """
        row_scale = torch.empty(rows, dtype=torch.float32, device=stats.device)
        loss = coefficients if isinstance(coefficients, TokenCrossEntropy) else None
        if loss is not None:
            table, label_smoothing, z_loss = loss.scale.contiguous(), loss.label_smoothing, loss.z_loss
        else:
            tokens = self.tokens(block, rows)
            table, label_smoothing, z_loss = coefficients(stats[:, tokens], tokens).contiguous(), 0.0, 0.0
        _row_kernels().dlogits_kernel[(rows,)](
            block.kept, block.tiles, block.state, block.ids, stats, self.order, table, block.hidden,
            row_scale, block.first, block.rows, self.N, self.V, self.H, block.kept.stride(0), rows,
            label_smoothing, z_loss, self.scales.slope, self.scales.outer, CROSS_ENTROPY=loss is not None,
            HAS_SOFTCAP=self.flags["HAS_SOFTCAP"], ONE_REFERENCE=self.one_reference,
            SCALE_HIDDEN=needs.head, KEPT_SCALE=self.kept_scale,
            BN=self.tiles.bn, TILES=max(1, 4096 // self.tiles.bn), BLOCK=1024, num_warps=8,
        )  # fmt: skip
        return row_scale


class BlockGradients:
    """The gradients of a call, a block at a time. `single`: there is one block, so dW needs no fp32 sum."""

    def __init__(self, call: EpilogueCall, needs: NeedsGrad, *, single: bool) -> None:
        self.call, self.needs, self.single = call, needs, single
        self.out = empty_gradients(call.inputs, needs)
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.empty = True

    def add(self, block: Block, stats: Tensor, coefficients: TokenCoefficients) -> None:
        """Add a block's tokens, whose statistics are in the table [7, N]."""
        call, needs = self.call, self.needs
        rows = max(0, min(block.rows, call.how_many() - block.first))
        if self.empty and needs.hidden and call.how_many() < call.N:
            self.out.hidden.zero_()  # rows of ignored tokens are not written
        self.empty = False
        if rows == 0:
            return
        row_scale = call.dlogits(block, rows, stats, coefficients, needs)
        grad, x = block.kept[:rows], block.hidden[:rows]
        if needs.hidden:
            self._write_hidden(grad, row_scale, block.first)
        if needs.weight:
            self._add_weight(grad, x)
        if needs.bias:
            self._add_bias(grad, row_scale)

    def finish(self) -> Gradients:
        """The gradients in the dtypes of the inputs."""
        hidden, weight, bias = self.out
        if self.needs.hidden and self.empty:
            hidden.zero_()
        if self.needs.weight and self.weight is not weight:
            weight.zero_() if self.weight is None else weight.copy_(self.weight)
        if self.needs.bias:
            bias.zero_() if self.bias is None else bias.copy_(self.bias)
        return self.out

    def _write_hidden(self, grad: Tensor, row_scale: Tensor, first: int) -> None:
        """dX; where rows have a factor it comes in fp32, so that it is rounded once."""
        call = self.call
        dtype = torch.float32 if call.one_reference else grad.dtype
        dx = torch.empty(grad.shape[0], call.H, dtype=dtype, device=grad.device)
        mm(grad, call.weight, dx)
        _row_kernels().scatter_kernel[(grad.shape[0],)](
            dx, row_scale, call.order, self.out.hidden, first, call.H, SCALED=call.one_reference, BLOCK=1024
        )

    def _add_weight(self, grad: Tensor, x: Tensor) -> None:
        if self.weight is not None:
            mm(grad.t(), x, self.weight, add=True)
            return
        if self.single:
            self.weight = self.out.weight
        else:
            self.weight = torch.empty(self.out.weight.shape, dtype=torch.float32, device=x.device)
        mm(grad.t(), x, self.weight)

    def _add_bias(self, grad: Tensor, row_scale: Tensor) -> None:
        """Column sums by a GEMM, whose order is fixed. Its factor has two columns, so that no digits of the
        row's factor are lost."""
        factor = torch.zeros(grad.shape[0], 8, dtype=grad.dtype, device=grad.device)
        if self.call.one_reference:
            factor[:, 0] = row_scale
            factor[:, 1] = row_scale - factor[:, 0].float()
        else:
            factor[:, 0] = 1
        sums = torch.empty(grad.shape[1], 8, dtype=torch.float32, device=grad.device)
        mm(grad.t(), factor, sums)
        total = sums[:, 0] + sums[:, 1]
        self.bias = total if self.bias is None else self.bias + total


def _compacted(ids: Tensor) -> tuple[Tensor, Tensor, Callable[[], int]]:
    """order [N] and count [1], int32, and a function that tells the count.

    On a GPU it waits for no more than what was queued before this call. Under graph capture nothing can be
    asked, so all tokens count.
    """
    N = ids.numel()
    if ids.is_cuda and torch.cuda.is_current_stream_capturing():
        order = torch.arange(N, dtype=torch.int32, device=ids.device)
        return order, torch.full((1,), N, dtype=torch.int32, device=ids.device), lambda: N
    order = torch.empty(N, dtype=torch.int32, device=ids.device)
    count = torch.empty(1, dtype=torch.int32, device=ids.device)
    _row_kernels().compact_kernel[(1,)](ids, order, count, N, BLOCK=4096, num_warps=8)
    if not count.is_cuda:
        return order, count, functools.cache(lambda: int(count))
    on_host = torch.empty(1, dtype=torch.int32, pin_memory=True)
    on_host.copy_(count, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    @functools.cache
    def how_many() -> int:
        copied.synchronize()
        return int(on_host[0])

    return order, count, how_many


def _readable_by_tma(weight: Tensor) -> Tensor:
    """The weight, or a copy if its rows are not contiguous or not 16 bytes apart."""
    aligned = weight.data_ptr() % 16 == 0 and weight.stride(0) * weight.element_size() % 16 == 0
    if weight.stride(1) == 1 and aligned:
        return weight
    return weight.clone(memory_format=torch.contiguous_format)


def _descriptor(matrix: Tensor, rows: int, columns: int):
    from triton.tools.tensor_descriptor import TensorDescriptor  # Triton is absent on macOS and Windows

    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


def _kernels():
    from . import epilogue_triton

    return epilogue_triton


def _row_kernels():
    from . import epilogue_rows_triton

    return epilogue_rows_triton
