"""The engine for `tail_eps` on GPUs that run linear/epilogue.py: its forward pass, and backward GEMMs over
the columns that matter.

tail_columns.py has the formula. A block's tokens come in parts of PART, each with its own K, m, q and r. The
columns are sorted so that those kept by the same parts stand together, and go through the GEMMs in tiles of
TILE. A part keeps all columns of a tile if it keeps one: these are exact at no cost.

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

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..triton_launch import launch
from .chunks import capturing
from .engine import TokenCoefficients
from .epilogue import EpilogueStatistics, architecture
from .epilogue_call import Block, EpilogueCall, descriptor
from .epilogue_gradients import BlockGradients, Factors
from .inputs import NeedsGrad
from .plan import TOKENS
from .tail_columns import COUNTER, DENSE
from .token_losses import TokenCrossEntropy

PART = TOKENS["cuda"]  # tokens that share their kept columns
MOST_PARTS = 15  # of a block: the order of the columns is a number of so many bits
TILE = 128  # columns
MATRIX_ROWS = 16  # MOST_PARTS and one for label smoothing


class TailTiles(NamedTuple):
    """How the GEMMs run."""

    bm: int = 128  # tokens of a tile of dX
    bh: int = 256  # of the hidden size
    bk: int = 64
    warps: int = 8
    stages: int = 7  # 4 buffers: the tile numbers that the loop reads take the rest


# By compute capability. Those that no GPU has measured are compiled, and not used (gpu_plan.py).
TILES = {
    80: TailTiles(bh=128, bk=32, stages=4),
    90: TailTiles(),
    100: TailTiles(bh=128),
    120: TailTiles(bh=128, stages=5),
}


def tiles_for(capability: int) -> TailTiles:
    """The tiles of a compute capability."""
    return TILES[max(known for known in TILES if known <= capability)]


class RowTiles(NamedTuple):
    """What a program of the kernels that read e takes at a time."""

    rows: int
    columns: int
    warps: int
    stages: int  # of loads


# On an H200 at N 8192 and V 151936: 0.79 ms for the columns (8 rows in 8 warps without stages: 0.93), 1.2 to
# 1.3 ms for collecting (with 3 stages: 2.1).
COLUMNS = RowTiles(rows=16, columns=256, warps=4, stages=3)
COLLECT = RowTiles(rows=64, columns=64, warps=4, stages=1)
COLLECT_FULL = RowTiles(rows=64, columns=64, warps=8, stages=1)  # with logarithms; 4 warps would spill
PROGRAMS = 2048  # of collect_kernel at least


class KeptTiles(NamedTuple):
    """Which column tiles the parts of a block keep."""

    part_rows: int  # tokens of a part
    parts: int
    columns: Tensor  # [V] int64, sorted
    places: Tensor  # [V] int32: where a column stands in `columns`
    column_parts: Tensor  # [V] int32, a bit for each part that keeps the column's tile
    tile_parts: Tensor  # [tiles, 16] int32, their numbers
    tile_counts: Tensor  # [tiles] int32, how many
    lists: Tensor  # [parts, tiles] int32: the tiles of each part
    counts: Tensor  # [parts + 1] int32: how many; last, the tiles of any part
    q: Tensor  # [16, V] fp32: of each part, 0 where it keeps the column; then ones
    q_by_place: Tensor  # [V, 16]: the same, by place
    scale: Tensor  # [16, 1]: 1 / sum(q) of each part; then 1

    @property
    def of_columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the kernels of dW and of the bias's gradient read of the columns."""
        return self.columns, self.tile_parts, self.tile_counts, self.q_by_place


class TailEpilogue(EpilogueStatistics):
    """See the top of this file."""

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
    """Gradients of a call, a block at a time: those of a block of few kept columns by these, else dense."""

    def __init__(self, call: EpilogueCall, needs: NeedsGrad, *, single: bool) -> None:
        super().__init__(call, needs, single=single)
        device = call.inputs.hidden.device
        self.tail_tiles = tiles_for(architecture(device.index) if device.type == "cuda" else 90)

    def factors(self, block: Block, stats: Tensor, coefficients: TokenCoefficients) -> Factors | None:
        """As the base's. A block of many kept columns, and any under graph capture, is dense."""
        call, rows = self.call, self.rows(block)
        if rows == 0 or capturing(stats):
            return super().factors(block, stats, coefficients)
        kept, how_many = select_tiles(call, block, rows, stats)
        towards = stats.new_empty(0)
        if self.needs.hidden:  # queued before the host waits
            towards = thin_product(kept.q, call.weight) * kept.scale
        counts = how_many()
        if not _count(kept, counts, rows, call.V):
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
        call, tiles = self.call, self.tail_tiles
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
            TILE=TILE,
            BM=tiles.bm,
            BH=tiles.bh,
            BK=tiles.bk,
            PROGRAMS=call.multiprocessors,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )

    def _add_tiles_weight(self, factors: TailFactors) -> None:
        call, tiles = self.call, self.tail_tiles
        grad, hidden, kept = factors.dlogits, factors.hidden, factors.kept
        add = self.weight is not None
        if self.weight is None:
            self.weight = self.new_weight()
        descriptors = descriptor(grad, TILE, tiles.bk), descriptor(hidden, tiles.bk, tiles.bh)
        rank_one = thin_product(factors.dropped, hidden) * kept.scale
        launch(
            _gemms().weight_kernel,
            call.multiprocessors,
            (*descriptors, *kept.of_columns, rank_one, self.weight),
            (call.V, call.H, kept.part_rows),
            ADD=add,
            TILE=TILE,
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
            TILE=TILE,
            BK=self.tail_tiles.bk,
        )


def part_tokens(rows: int) -> int:
    """Tokens of a part of a block."""
    granule = PART // 4
    return max(PART, -(-rows // (MOST_PARTS * granule)) * granule)


def select_tiles(
    call: EpilogueCall, block: Block, rows: int, stats: Tensor
) -> tuple[KeptTiles, Callable[[], list[int]]]:
    """The tiles that the parts of a block keep, and a function that waits for `counts`."""
    V, device = call.V, stats.device
    part_rows = part_tokens(rows)
    parts, tiles = -(-rows // part_rows), -(-V // TILE)
    kernels = _kernels()
    options = call.inputs.options

    def numbers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    largest = torch.empty(parts, V, dtype=torch.float32, device=device)
    q = torch.zeros(MATRIX_ROWS, V, dtype=torch.float32, device=device)
    q_by_place = torch.empty(V, MATRIX_ROWS, dtype=torch.float32, device=device)
    sizes = (block.first, block.rows, rows, call.N, V, part_rows, block.kept.stride(0))
    launch(
        kernels.columns_kernel,
        (-(-V // call.tiles.kept.bn), parts),
        (block.kept, block.state, block.ids, stats, call.order, largest, q),
        (*sizes, options.temperature / options.softcap if options.softcap else 0.0),
        HAS_SOFTCAP=call.flags["HAS_SOFTCAP"],
        KEPT_SCALE=call.kept_scale,
        BN=call.tiles.kept.bn,
        ROWS=COLUMNS.rows,
        STAGES=COLUMNS.stages,
        num_warps=COLUMNS.warps,
    )
    ranks = torch.empty(V, dtype=torch.int16, device=device)
    assert options.tail_eps is not None
    launch(kernels.rank_kernel, -(-V // 1024), (largest, ranks), (V, parts, options.tail_eps), BLOCK=1024)
    ranks, columns = torch.sort(ranks, descending=True, stable=True)
    places, column_parts, tile_parts = numbers(V), numbers(V), numbers(tiles, MATRIX_ROWS)
    tile_counts, tile_bits = numbers(tiles), numbers(tiles)
    of_tiles = (tile_parts, tile_counts, tile_bits, q, q_by_place)
    launch(
        kernels.place_kernel, tiles, (ranks, columns, places, column_parts, *of_tiles), (V, parts), TILE=TILE
    )
    lists, counts = numbers(parts, tiles), numbers(parts + 1)
    launch(kernels.list_kernel, parts + 1, (tile_bits, lists, counts), (tiles, parts), BLOCK=1024)
    how_many = on_host(counts)
    # of dz/dx's sign, which is logit_scale's; 0 where nothing is dropped or has a slope
    total = q.sum(1, keepdim=True)
    scale = torch.where(total == 0, 0.0, 1 / total)
    scale[parts] = 1
    kept = KeptTiles(
        part_rows=part_rows,
        parts=parts,
        columns=columns,
        places=places,
        column_parts=column_parts,
        tile_parts=tile_parts,
        tile_counts=tile_counts,
        lists=lists,
        counts=counts,
        q=q,
        q_by_place=q_by_place,
        scale=scale,
    )
    return kept, how_many


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
    loss = coefficients if isinstance(coefficients, TokenCrossEntropy) else None
    if loss is not None:
        table, label_smoothing, z_loss = loss.filled_scale().contiguous(), loss.label_smoothing, loss.z_loss
    else:
        tokens = call.tokens(block, rows)
        table, label_smoothing, z_loss = coefficients(stats[:, tokens], tokens).contiguous(), 0.0, 0.0
    options = call.inputs.options
    plogp = loss is None and not options.lean
    tiling = COLLECT_FULL if plogp or options.softcap else COLLECT
    line = -(-rows // 16) * 16  # TMA takes rows of whole 16 bytes
    memory = torch.empty(tiles * TILE, line, dtype=block.kept.dtype, device=stats.device)
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
            *(block.kept, block.state, block.ids, stats, call.order, table),
            *(kept.places, kept.column_parts, memory, dropped),
        ),
        (*sizes, *strides, label_smoothing, z_loss, call.scales.slope, softcap_slope),
        CROSS_ENTROPY=loss is not None,
        HAS_SOFTCAP=call.flags["HAS_SOFTCAP"],
        PLOGP=plogp,
        KEPT_SCALE=call.kept_scale,
        BN=call.tiles.kept.bn,
        COLUMNS=min(tiling.columns, call.tiles.kept.bn),
        ROWS=tiling.rows,
        STAGES=tiling.stages,
        num_warps=tiling.warps,
    )
    return memory[: min(tiles * TILE, call.V), :rows], dropped.sum(0)


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


def on_host(counts: Tensor) -> Callable[[], list[int]]:
    """A function that gives the numbers. On a GPU it waits for no more than what was queued before this."""
    if not counts.is_cuda:
        return counts.tolist
    numbers = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
    numbers.copy_(counts, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def how_many() -> list[int]:
        copied.synchronize()
        return numbers.tolist()

    return how_many


def _count(kept: KeptTiles, counts: list[int], rows: int, V: int) -> bool:
    """Count the kept columns; whether they are few enough for the tail."""
    tokens = [min(kept.part_rows, rows - part * kept.part_rows) for part in range(kept.parts)]
    used = sum(n * min(V, tiles * TILE) for n, tiles in zip(tokens, counts))
    few = used <= DENSE * rows * V
    COUNTER.add(kept=used if few else rows * V, total=rows * V)
    return few


def _kernels():
    from . import tail_gpu_triton

    return tail_gpu_triton


def _gemms():
    from . import tail_gemm_triton

    return tail_gemm_triton
