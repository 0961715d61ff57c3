"""One call of the engine in epilogue.py: its blocks of tokens and their launches."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import triton_launch
from ...gemm import mm
from ...triton_launch import Numbers, Pointers
from ..engine import TokenCoefficients
from ..inputs import HeadInputs, NeedsGrad
from ..token_losses import TokenCrossEntropy
from .host_count import HostCount


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

    def constants(self) -> dict[str, Any]:
        """The constexprs and launch options of the kernel."""
        return {
            **{"BM": self.bm, "BN": self.bn, "BK": self.bk, "GROUP": self.group, "PARTS": self.parts},
            **{"FLATTEN": self.flatten, "BRANCH": self.branch},
            **{"num_warps": self.warps, "num_stages": self.stages},
        }


class CallTiles(NamedTuple):
    """Tiles of a call's blocks; they have the same `bn`."""

    kept: Tiles  # where e is kept
    not_kept: Tiles


class Scales(NamedTuple):
    """The head's numbers as the kernels take them: z in base 2 is (x + bias) outer, or under a softcap
    tanh((x + bias) inner ln 2 / 2) outer."""

    inner: float
    outer: float
    slope: float  # dz/dx in nats, without a softcap

    @classmethod
    def of(cls, inputs: HeadInputs) -> Scales:
        """The scales of a call's options."""
        logit_scale, softcap, temperature = inputs.options.transform
        slope = logit_scale / temperature
        if softcap:
            return cls(
                2 * logit_scale / (softcap * math.log(2)), softcap / (temperature * math.log(2)), slope
            )
        return cls(0.0, slope / math.log(2), slope)


class CoefficientTable(NamedTuple):
    """Coefficients as kernels take them: [4, rows], or of cross-entropy a loss scale for each token [N]."""

    values: Tensor
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    cross_entropy: bool = False


class Block(NamedTuple):
    """Tokens order[first : first + rows] after the forward and the merge kernel."""

    first: int
    rows: int
    ids: Tensor  # [rows] int32
    hidden: Tensor  # [rows, H], gathered
    kept: Tensor  # [rows, V] e, or of size 0
    state: Tensor  # fp32: four numbers a row, and those of its tiles; see forward_kernel
    screened: Any = None  # of screen.py: e is that of 8-bit logits, and was used up


def state_size(inputs: HeadInputs, tiles: CallTiles, rows: int) -> int:
    """Numbers of a block's state: 4 a row, and 2 a row and tile, or 4 unless lean."""
    return state_numbers(tiles, inputs.vocab_size, 2 if inputs.options.lean else 4) * rows


def state_numbers(tiles: CallTiles, columns: int, of_tile: int) -> int:
    """Numbers of a row's state over so many columns."""
    return 4 + of_tile * -(-columns // tiles.kept.bn)


class EpilogueCall:
    """What the blocks of a call share, and the launches of a block.

    order [N + 1] holds the tokens that are not ignored first, and their number last. The first block's kernel
    fills it, unless the forward pass has saved it. `how_many()` waits for the number.
    """

    def __init__(
        self,
        inputs: HeadInputs,
        tiles: CallTiles,
        multiprocessors: int,
        order: Tensor | None = None,
        *,
        filled: bool = False,
    ) -> None:
        """order: memory for it; `filled` if the forward pass has saved the order there."""
        hidden, weight, options = inputs.hidden, inputs.weight, inputs.options
        self.inputs, self.tiles, self.multiprocessors = inputs, tiles, multiprocessors
        self.scales = Scales.of(inputs)
        self.weight = _readable_by_tma(weight.to(hidden.dtype))
        self.N, (self.V, self.H) = hidden.shape[0], weight.shape
        self.flags = {"HAS_BIAS": inputs.bias is not None, "HAS_SOFTCAP": options.softcap != 0}
        # One reference a row needs bf16's exponents, and a softcap's slope differs by column.
        self.one_reference = hidden.dtype != torch.float16 and not options.softcap
        self.kept_scale = 2.0**15 if hidden.dtype == torch.float16 else 1.0
        self.statistics = {"ENTROPY": not options.lean, "MEAN": not options.lean}
        self.filled = self.ordered = filled
        if order is None:
            order = torch.empty(self.N + 1, dtype=torch.int32, device=hidden.device)
        self.order = order
        self.how_many = HostCount(self.order, self.N)

    def tokens(self, block: Block, rows: int) -> Tensor | slice:
        """The indices of a block's first tokens."""
        if self.how_many() == self.N and not (self.filled and self.how_many.captured):
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

    def forward(
        self, first: int, rows: int, stats: Tensor, kept: Tensor | None, state: Tensor | None = None
    ) -> Block:
        """Write the statistics of a block into the table [7, N], and e into kept [rows, V].

        state: memory for the block's, if it is to outlast the block. The call's first block must be that of
        the first tokens: it also fills the rest of the table with 0.
        """
        state = self.new_state(rows) if state is None else state
        block = self.gather(first, rows, state if kept is None else kept, state, stats)
        self.write_exact(block, stats, KEEP=kept is not None)
        return block

    def new_state(self, rows: int) -> Tensor:
        """Memory for a block's state."""
        numbers = state_size(self.inputs, self.tiles, rows)
        return torch.empty(numbers, dtype=torch.float32, device=self.inputs.hidden.device)

    def write_exact(self, block: Block, stats: Tensor, **keep: bool) -> None:
        """Write the statistics of a gathered block into the table [7, N], and with KEEP its e."""
        tiles = self.tiles.kept if keep["KEEP"] else self.tiles.not_kept
        self.write_tiles(block, tiles, self.weight, self.inputs.bias, **keep, **self.statistics)
        self.merge(block, stats)

    def merge(self, block: Block, stats: Tensor) -> None:
        """Merge the tiles' numbers into statistics [7, N]."""
        launch(
            "merge_kernel",
            -(-block.rows // 32),
            (block.ids, self.order, stats, block.state),
            (block.first, block.rows, self.N, self.V, -(-self.V // self.tiles.kept.bn)),
            **self.statistics,
            ROWS=32,
            TILES=32,
        )

    def live_rows(self, block: Block) -> int:
        """The number of the block's tokens that are not ignored; they come first."""
        return max(0, min(block.rows, self.how_many() - block.first))

    def write_tiles(
        self, block: Block, tiles: Tiles, weight: Tensor, bias: Tensor | None, **constants: bool
    ) -> None:
        """Write the tiles' numbers of a gathered block, and with KEEP its e, by the forward kernel.

        weight, bias: rows of the vocabulary, whose first the block's ids count from.
        """
        (V, H), programs = weight.shape, tiles.per_sm * self.multiprocessors
        descriptors = (
            descriptor(block.hidden, tiles.bm, tiles.bk),
            descriptor(weight, tiles.bn, tiles.bk),
            # a descriptor needs memory, even if nobody writes
            descriptor(block.kept if constants["KEEP"] else block.hidden, tiles.bm, tiles.bn // tiles.parts),
        )
        launch(
            "forward_kernel",
            programs,
            (*descriptors, block.ids, bias, self.order, block.state),
            (block.first, block.rows, self.N, V, H, self.scales.inner, self.scales.outer),
            **self.flags,
            **constants,
            KEPT_SCALE=self.kept_scale,
            **tiles.constants(),
            PROGRAMS=programs,
        )

    def gather(
        self, first: int, rows: int, kept: Tensor, state: Tensor, stats: Tensor | None = None
    ) -> Block:
        """A block before the forward kernel; without `stats` [7, N] after it, when its state is known."""
        hidden, ids, bias = self.inputs.hidden, self.inputs.ids, self.inputs.bias
        block_ids = torch.empty(rows, dtype=torch.int32, device=ids.device)
        gathered = torch.empty(rows, self.H, dtype=hidden.dtype, device=hidden.device)
        push = not self.ordered
        of_call = (hidden, self.weight, ids, bias, self.order, self.how_many.memory, stats)
        sizes = (first, rows, self.N, self.V, self.H, *hidden.stride(), self.weight.stride(0), self.V // 2)
        launch(
            "gather_kernel",
            -(-(self.N if push else rows) // 32),
            (*of_call, gathered, block_ids, state),
            (*sizes, int(self.how_many.captured), self.scales.inner, self.scales.outer),
            **self.flags,
            PUSH=push,
            REFERENCE=self.one_reference,
            NEW=stats is not None,
            BM=32,
            SAMPLE=64,
            BK=64,
            BLOCK=2048,
        )
        self.how_many.written()
        self.ordered = True
        return Block(first, rows, block_ids, gathered, kept, state)

    def coefficient_table(
        self, block: Block, rows: int, stats: Tensor, coefficients: TokenCoefficients
    ) -> CoefficientTable:
        """The coefficients of a block's first `rows` tokens, from the statistics [7, N]."""
        if isinstance(coefficients, TokenCrossEntropy):
            loss = coefficients
            values = loss.filled_scale().contiguous()
            return CoefficientTable(values, loss.label_smoothing, loss.z_loss, cross_entropy=True)
        tokens = self.tokens(block, rows)
        return CoefficientTable(coefficients(stats[:, tokens], tokens).contiguous())

    def dlogits(
        self,
        block: Block,
        rows: int,
        stats: Tensor,
        coefficients: TokenCoefficients,
        needs: NeedsGrad,
        scaled: Tensor | None = None,
    ) -> Tensor:
        """Turn e of a block's first tokens into dlogits / row_scale, and x into row_scale x if dW needs it.

        stats: [7, N]. scaled: memory [rows, H] for row_scale x in place of x's own, where the block holds a
        part of the vocabulary: row_scale is then the same for all parts. Returns row_scale [rows].
        """
        row_scale = torch.empty(rows, dtype=torch.float32, device=stats.device)
        table = self.coefficient_table(block, rows, stats, coefficients)
        bn = self.tiles.kept.bn
        sizes = (block.first, block.rows, self.N, block.kept.shape[1], self.H, block.kept.stride(0), rows)
        of_hidden = (block.hidden, block.hidden if scaled is None else scaled, row_scale)
        launch(
            "dlogits_kernel",
            rows,
            (block.kept, block.state, block.ids, stats, self.order, table.values, *of_hidden),
            (*sizes, table.label_smoothing, table.z_loss, self.scales.slope, self.scales.outer),
            CROSS_ENTROPY=table.cross_entropy,
            HAS_SOFTCAP=self.flags["HAS_SOFTCAP"],
            ONE_REFERENCE=self.one_reference,
            PART=scaled is not None,
            SCALE_HIDDEN=needs.head,
            KEPT_SCALE=self.kept_scale,
            BN=bn,
            TILES=max(1, 2048 // bn),
            BLOCK=1024,
            num_warps=8,
        )
        return row_scale

    def column_sums(self, grad: Tensor, row_scale: Tensor) -> Tensor:
        """The bias's gradient, fp32, by a GEMM, whose order is fixed. Its factor has two columns, so that no
        digits of the row's factor are lost."""
        factor = torch.zeros(grad.shape[0], 8, dtype=grad.dtype, device=grad.device)
        if self.one_reference:
            factor[:, 0] = row_scale
            factor[:, 1] = row_scale - factor[:, 0].float()
        else:
            factor[:, 0] = 1
        sums = torch.empty(grad.shape[1], 8, dtype=torch.float32, device=grad.device)
        mm(grad.t(), factor, sums)
        return sums[:, 0] + sums[:, 1]

    def scatter(self, dx: Tensor, row_scale: Tensor, first: int, out: Tensor) -> None:
        """Write dX [rows, H], times its rows' factors if given, to tokens order[first], ... of out."""
        launch(
            "scatter_kernel",
            dx.shape[0],
            (dx, row_scale, self.order, out),
            (first, self.H),
            SCALED=self.one_reference,
            BLOCK=1024,
        )


def _readable_by_tma(weight: Tensor) -> Tensor:
    """The weight, or a copy if its rows are not contiguous or not 16 bytes apart."""
    aligned = weight.data_ptr() % 16 == 0 and weight.stride(0) * weight.element_size() % 16 == 0
    if weight.stride(1) == 1 and aligned:
        return weight
    return weight.clone(memory_format=torch.contiguous_format)


def descriptor(matrix: Tensor, rows: int, columns: int) -> Any:
    """A tensor descriptor of the matrix, by which kernels read blocks [rows, columns]."""
    return _descriptor_type()(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


@functools.cache
def _descriptor_type() -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor  # Triton is absent on macOS and Windows

    return TensorDescriptor


@functools.cache
def _kernel(name: str) -> Any:
    from . import epilogue_rows_triton, epilogue_triton  # Triton is absent on macOS and Windows

    module = epilogue_triton if hasattr(epilogue_triton, name) else epilogue_rows_triton
    return getattr(module, name)


def launch(kernel: str, grid: int, pointers: Pointers, numbers: Numbers, **constants: Any) -> None:
    """Launch a kernel of epilogue_triton or epilogue_rows_triton by its name (triton_launch.py)."""
    triton_launch.launch(_kernel(kernel), grid, pointers, numbers, **constants)
