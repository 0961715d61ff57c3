"""Which column tiles the tokens of a block keep, for the engines of tail.py and screen.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...triton_launch import launch
from ..chunks import on_host
from ..plan import TOKENS
from ..tail_columns import COUNTER, DENSE, ColumnCounts
from .epilogue_call import Block, EpilogueCall

PART = TOKENS["cuda"]  # tokens that share their kept columns
MOST_PARTS = 15  # of a block: the order of the columns is a number of so many bits
TILE = 128  # columns
MATRIX_ROWS = 16  # MOST_PARTS and one for label smoothing


class RowTiles(NamedTuple):
    """What a program of the kernels that read e takes at a time."""

    rows: int
    columns: int
    warps: int
    stages: int  # of loads


# On an H200 at N 8192 and V 151936: 0.79 ms (8 rows in 8 warps without stages: 0.93).
COLUMNS = RowTiles(rows=16, columns=256, warps=4, stages=3)


class KeepingRule(NamedTuple):
    """When a part of a block keeps a column."""

    eps: float  # the probability of some token exceeds it, by the logits of the block
    part: int  # tokens of a part, at least
    margins: Tensor | None = None  # [rows]: powers of 2 below a token's largest P within which all are kept


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


def part_tokens(rows: int, least: int) -> int:
    """Tokens of a part of a block: at least `least`."""
    granule = least // 4
    return max(least, -(-rows // (MOST_PARTS * granule)) * granule)


def select_tiles(
    call: EpilogueCall, block: Block, rows: int, stats: Tensor, rule: KeepingRule
) -> tuple[KeptTiles, Callable[[], list[int]]]:
    """The tiles that the parts of a block keep, and a function that waits for `counts`.

    rows: the block's tokens that are not ignored. stats: [7, N].
    """
    V, device = call.V, stats.device
    part_rows = part_tokens(rows, rule.part)
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
        (block.kept, block.state, block.ids, stats, call.order, rule.margins, largest, q),
        (*sizes, options.temperature / options.softcap if options.softcap else 0.0),
        HAS_SOFTCAP=call.flags["HAS_SOFTCAP"],
        KEPT_SCALE=call.kept_scale,
        BN=call.tiles.kept.bn,
        ROWS=COLUMNS.rows,
        STAGES=COLUMNS.stages,
        num_warps=COLUMNS.warps,
    )
    ranks = torch.empty(V, dtype=torch.int16, device=device)
    launch(kernels.rank_kernel, -(-V // 1024), (largest, ranks), (V, parts, rule.eps), BLOCK=1024)
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
    # total has the sign of dz/dx, which is logit_scale's; it is 0 if nothing is dropped or has a slope
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


def kept_logits(kept: KeptTiles, counts: list[int], rows: int, V: int) -> int:
    """Logits of the tiles that are kept, over a block's tokens; counts: those of `kept`, on the host."""
    tokens = [min(kept.part_rows, rows - part * kept.part_rows) for part in range(kept.parts)]
    return sum(n * min(V, tiles * TILE) for n, tiles in zip(tokens, counts))


def count_kept(used: int, rows: int, V: int) -> bool:
    """Count the kept columns of a block; whether they are few enough for the tail."""
    few = used <= DENSE * rows * V
    COUNTER.add(ColumnCounts(kept=used if few else rows * V, total=rows * V))
    return few


def _kernels():
    from . import tail_triton  # Triton is absent on macOS and Windows

    return tail_triton
