"""The engine for `tail_eps` on GPUs that run epilogue.py: its forward pass, and backward GEMMs over
the columns that matter.

tail_columns.py has the formula, tail_tiles.py chooses the columns. A block's tokens come in parts of PART,
each with its own K, m, q and r. The columns are sorted so that those kept by the same parts stand together,
and go through the GEMMs in tiles of TILE. A part keeps all columns of a tile if it keeps one: these are exact
at no cost.

    forward    logits GEMM, its statistics, e = P 2^(lse - r) in 16 bits (epilogue.py)
    columns    the largest P and the sum of each column over each part; one read of e
    collect    dlogits of kept columns, [columns kept by some part, tokens]; one read of e, which is free then
    dX, dW     a GEMM each that skips the tiles that a part does not keep. It adds the rank-1 parts and writes
               its result once, in its final dtype

GEMMs: 1 + 2 f with f the share of columns in kept tiles, and dense (3) where f > DENSE. Bytes beside the
GEMMs' own: 4 N V, 2 f N V, and 2 V H for the product of q with W. The host asks the device once a block, how
many tiles are kept; meanwhile the device multiplies q by W. Under graph capture it cannot ask, and all
columns take part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...device import architecture
from ...triton_launch import launch
from ..chunks import capturing
from ..engine import TokenCoefficients
from ..inputs import NeedsGrad
from . import tail_tiles
from .epilogue import EpilogueStatistics
from .epilogue_call import Block, EpilogueCall, descriptor
from .epilogue_gradients import BlockGradients, Factors
from .tail_tiles import MATRIX_ROWS, KeepingRule, KeptTiles, RowTiles


class TailTiles(NamedTuple):
    """How the GEMMs run."""

    bm: int = 128  # tokens of a tile of dX
    bh: int = 256  # of the hidden size
    bk: int = 64
    warps: int = 8
    stages: int = 7  # 4 buffers: the tile numbers that the loop reads take the rest


# By compute capability. Those that no GPU has measured are compiled, and not used (plan.py).
TILES = {
    80: TailTiles(bh=128, bk=32, stages=4),
    90: TailTiles(),
    100: TailTiles(bh=128),
    120: TailTiles(bh=128, stages=5),
}


def tiles_for(capability: int) -> TailTiles:
    """The tiles of a compute capability."""
    return TILES[max(known for known in TILES if known <= capability)]


# On an H200 at N 8192 and V 151936: 1.2 to 1.3 ms (with 3 stages: 2.1).
COLLECT = RowTiles(rows=64, columns=64, warps=4, stages=1)
COLLECT_FULL = RowTiles(rows=64, columns=64, warps=8, stages=1)  # with logarithms; 4 warps would spill
PROGRAMS = 2048  # of collect_kernel at least


class TailEpilogue(EpilogueStatistics):
    """The engine of this file."""

    def new_gradients(self, call: EpilogueCall, needs: NeedsGrad, *, single: bool) -> BlockGradients:
        return TailGradients(call, needs, single=single)


@dataclass(frozen=True)
class TailFactors(Factors):
    """dlogits [columns, rows] of the tiles that some part keeps, in the order of kept.columns; the rest as
    rank-1 matrices."""

    dropped: Tensor  # [16, rows] fp32: by part, sums of dlogits that are dropped; then what smoothing adds
    towards: Tensor  # [16, H] fp32: kept.scale q W; of size 0 without a gradient of hidden
    kept: KeptTiles


class TailGradients(BlockGradients):
    """Gradients of a call, a block at a time, with a tail if few of the block's columns are kept."""

    def __init__(self, call: EpilogueCall, needs: NeedsGrad, *, single: bool) -> None:
        super().__init__(call, needs, single=single)
        device = call.inputs.hidden.device
        self.gemm_tiles = tiles_for(architecture(device.index) if device.type == "cuda" else 90)

    def factors(self, block: Block, stats: Tensor, coefficients: TokenCoefficients) -> Factors | None:
        """The factors of a block's GEMMs, dense if many columns are kept, and under graph capture."""
        call, rows = self.call, self.call.live_rows(block)
        if rows == 0 or capturing(stats):
            return super().factors(block, stats, coefficients)
        tail_eps = call.inputs.options.tail_eps
        assert tail_eps is not None
        rule = KeepingRule(tail_eps, tail_tiles.PART)
        kept, how_many = tail_tiles.select_tiles(call, block, rows, stats, rule)
        towards = stats.new_empty(0)
        if self.needs.hidden:  # queued before the host waits
            towards = thin_product(kept.q, call.weight) * kept.scale
        counts = how_many()
        if not tail_tiles.count_kept(tail_tiles.kept_logits(kept, counts, rows, call.V), rows, call.V):
            return super().factors(block, stats, coefficients)
        dlogits, dropped = collect(call, block, rows, stats, coefficients, kept, counts[-1])
        return TailFactors(block.first, dlogits, block.hidden[:rows], dropped, towards, kept)

    def add(self, factors: Factors | None) -> None:
        if not isinstance(factors, TailFactors):
            super().add(factors)
            return
        if self.needs.hidden:
            self._write_tiles_hidden(factors)
        if self.needs.weight:
            self._add_tiles_weight(factors)
        if self.needs.bias:
            self._add_tiles_bias(factors)

    def _write_tiles_hidden(self, factors: TailFactors) -> None:
        call, tiles = self.call, self.gemm_tiles
        grad, kept = factors.dlogits, factors.kept
        columns, rows = grad.shape
        weight = call.weight.index_select(0, kept.columns[:columns])
        descriptors = descriptor(grad, tiles.bk, tiles.bm), descriptor(weight, tiles.bk, tiles.bh)
        rest = (factors.dropped, factors.towards, call.order, self.out.hidden)
        launch(
            _gemms().hidden_kernel,
            call.multiprocessors,
            (*descriptors, kept.lists, kept.counts, *rest),
            (factors.first, rows, call.H, kept.part_rows, kept.parts, kept.lists.shape[1]),
            TILE=tail_tiles.TILE,
            BM=tiles.bm,
            BH=tiles.bh,
            BK=tiles.bk,
            PROGRAMS=call.multiprocessors,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )

    def _add_tiles_weight(self, factors: TailFactors) -> None:
        call, tiles = self.call, self.gemm_tiles
        grad, hidden, kept = factors.dlogits, factors.hidden, factors.kept
        add = self.weight is not None
        if self.weight is None:
            self.weight = self.new_weight()
        descriptors = descriptor(grad, tail_tiles.TILE, tiles.bk), descriptor(hidden, tiles.bk, tiles.bh)
        rank_one = thin_product(factors.dropped, hidden) * kept.scale
        launch(
            _gemms().weight_kernel,
            call.multiprocessors,
            (*descriptors, *kept.of_columns, rank_one, self.weight),
            (call.V, call.H, kept.part_rows),
            ADD=add,
            TILE=tail_tiles.TILE,
            BH=tiles.bh,
            BK=tiles.bk,
            PROGRAMS=call.multiprocessors,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )

    def _add_tiles_bias(self, factors: TailFactors) -> None:
        call, grad, kept = self.call, factors.dlogits, factors.kept
        add = self.bias is not None
        if self.bias is None:
            self.bias = torch.empty(call.V, dtype=torch.float32, device=grad.device)
        rank_one = factors.dropped.sum(1) * kept.scale[:, 0]
        launch(
            _gemms().bias_kernel,
            len(kept.tile_counts),
            (grad, *kept.of_columns, rank_one, self.bias),
            (grad.shape[1], call.V, kept.part_rows, grad.stride(0)),
            ADD=add,
            TILE=tail_tiles.TILE,
            BK=self.gemm_tiles.bk,
        )


def collect(
    call: EpilogueCall,
    block: Block,
    rows: int,
    stats: Tensor,
    coefficients: TokenCoefficients,
    kept: KeptTiles,
    tiles: int,
) -> tuple[Tensor, Tensor]:
    """dlogits [columns, rows] of the tiles that some part keeps, and the sums [16, rows] of the rest."""
    table = call.coefficient_table(block, rows, stats, coefficients)
    options = call.inputs.options
    plogp = not table.cross_entropy and not options.lean
    tiling = COLLECT_FULL if plogp or options.softcap else COLLECT
    line = -(-rows // 16) * 16  # TMA takes rows of whole 16 bytes
    memory = torch.empty(tiles * tail_tiles.TILE, line, dtype=block.kept.dtype, device=stats.device)
    grid = -(-rows // tiling.rows)
    width = -(-call.V // -(-PROGRAMS // grid) // call.tiles.kept.bn) * call.tiles.kept.bn
    slices = -(-call.V // width)
    dropped = torch.zeros(slices, MATRIX_ROWS, rows, dtype=torch.float32, device=stats.device)
    sizes = (block.first, block.rows, rows, call.N, call.V, kept.part_rows, kept.parts, width)
    strides = (block.kept.stride(0), rows, line)
    softcap_slope = options.temperature / options.softcap if options.softcap else 0.0
    launch(
        _kernels().collect_kernel,
        (grid, slices),
        (
            *(block.kept, block.state, block.ids, stats, call.order, table.values),
            *(kept.places, kept.column_parts, memory, dropped),
        ),
        (*sizes, *strides, table.label_smoothing, table.z_loss, call.scales.slope, softcap_slope),
        CROSS_ENTROPY=table.cross_entropy,
        HAS_SOFTCAP=call.flags["HAS_SOFTCAP"],
        PLOGP=plogp,
        KEPT_SCALE=call.kept_scale,
        BN=call.tiles.kept.bn,
        COLUMNS=min(tiling.columns, call.tiles.kept.bn),
        ROWS=tiling.rows,
        STAGES=tiling.stages,
        num_warps=tiling.warps,
    )
    return memory[: min(tiles * tail_tiles.TILE, call.V), :rows], dropped.sum(0)


def thin_product(left: Tensor, right: Tensor) -> Tensor:
    """left [16, K] in fp32 times right [K, H]: [16, H] in fp32."""
    K, H = right.shape
    splits = max(1, min(64, K // 256))
    chunk = -(-K // splits // 64) * 64
    out = torch.empty(-(-K // chunk), MATRIX_ROWS, H, dtype=torch.float32, device=left.device)
    launch(
        _gemms().thin_kernel,
        (-(-H // 128), out.shape[0]),
        (left, right, out),
        (K, H, right.stride(0), chunk),
        BK=64,
        BH=128,
        num_warps=4,
        num_stages=3,
    )
    return out.sum(0)


def _kernels():
    from . import tail_triton

    return tail_triton


def _gemms():
    from . import tail_gemm_triton

    return tail_gemm_triton
