"""The engine for `screen` on the GPUs that run epilogue.py: 8-bit logits everywhere, exact ones of the
columns that matter to a part of the tokens.

linear/screen.py has the idea, tail.py the parts and tiles of columns. A block runs

    codes      weight and hidden states in 8 bits (screen_codes.py)
    logits     an 8-bit GEMM whose epilogue dequantises, takes the statistics and writes e, as epilogue.py's
    columns    the tiles that a part keeps: where some token has P > eps, is at its target, or may have its
               largest logit; eps is tail_eps, or UNTAILED_EPS without one
    exact      sums over the other columns, one read of e; then a GEMM over the kept tiles, whose p takes e's
               place; then statistics of both together
    dX, dW     as the tail's (tail.py), from dlogits that finish_kernel makes of p

Time in GEMMs: 1/2 + 3 f with gradients, 1/2 + f without, where the tail takes 1 + 2 f and exact logits 3 and
1; f is the share of columns in kept tiles. Bytes beside the GEMMs' own: 6 N V for e, written once and read
twice, 6 f N V, and 3 V H for the codes. So it pays where H is large. The host asks the device twice a call,
and twice for each block.

A block is computed exactly, all its logits, if the 8-bit error is too large for one of its tokens
(LARGEST_NOISE of linear/screen.py) or if DENSE of the columns matter. If too many matter to some tokens that
are probed, and under graph capture, the call is exact as a whole.

No GPU has run this. Its kernels run in Triton's interpreter in the tests, and compile without spills.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...gemm import mm
from ...triton_launch import launch
from ..chunks import capturing, on_host
from ..engine import TokenCoefficients
from ..inputs import HeadInputs, NeedsGrad
from ..screen import COUNTER, EXACT_EPS, EXACTLY_PROBED, LARGEST_NOISE, LARGEST_SHARE, MARGIN, ScreenCounts
from ..tail_columns import DENSE
from . import tail_tiles
from .epilogue_call import Block, EpilogueCall, Tiles, descriptor
from .epilogue_gradients import BlockGradients, Factors
from .plan import UNKEPT_TOKENS, row_elements
from .screen_codes import GpuCodes, WeightCodes, code_hidden, code_weight
from .tail import TailEpilogue, TailFactors, TailGradients, thin_product
from .tail_tiles import MATRIX_ROWS, KeepingRule, KeptTiles, RowTiles

# Of SmolLM2's head over 2048 tokens logp is then off by 1.6e-4 nats rms, entropy by 8e-4, and f is 0.105; at
# 2**-14 by 2.9e-5 and 2e-4, and f is 0.25 (bench.experiments.screened_tiles, emulated on a CPU).
UNTAILED_EPS = 2.0**-11
UNKEPT_PART = 256  # tokens of its parts: fewer keep fewer columns, and no gradient needs larger ones
# With these the 8-bit kernel has no spills on sm_90, neither lean nor with all statistics.
SCREEN_TILES = Tiles(bk=128, stages=3, group=16, parts=2, branch=False)
REST = RowTiles(rows=64, columns=64, warps=4, stages=1)
PROGRAMS = 2048  # of rest_kernel at least
# Tokens of a program, of one part:
MERGE_ROWS = 32
FINISH_ROWS = 64


class ExactTiles(NamedTuple):
    """How the GEMM of the exact logits runs."""

    bm: int = 256  # tokens
    bk: int = 64
    warps: int = 8
    stages: int = 4


EXACT_TILES = ExactTiles()


class Screened(NamedTuple):
    """What the gradient of a block needs beside its statistics."""

    kept: KeptTiles
    p: Tensor  # [columns, line], of kept columns by place
    dropped: Tensor  # [3, live] fp32 of merge_exact_kernel
    used: int  # logits of the tiles that are kept


class ScreenedEpilogue(TailEpilogue):
    """The engine of this file."""

    unkept_tokens = UNKEPT_TOKENS

    def __init__(self, *arguments: Any, screen_tiles: Tiles = SCREEN_TILES, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.screen_tiles = screen_tiles

    def new_call(self, *arguments: Any, filled: bool) -> EpilogueCall:
        return ScreenedCall(*arguments, filled=filled, screen_tiles=self.screen_tiles)

    def empty_saved(self, inputs: HeadInputs, needs: NeedsGrad) -> list[Tensor]:
        """What the base saves, and `SavedTiles`."""
        saved = super().empty_saved(inputs, needs)
        return [*saved, *SavedTiles.empty(saved[0], inputs.vocab_size)] if saved else []

    def save(self, block: Block, saved: list[Tensor]) -> None:
        if block.screened is not None:
            SavedTiles(*saved[3:]).write(block.screened)

    def saved_block(self, call: EpilogueCall, saved: list[Tensor]) -> Block:
        block = super().saved_block(call, saved)
        return block._replace(screened=SavedTiles(*saved[3:]).read(block))

    def new_gradients(self, call: EpilogueCall, needs: NeedsGrad, *, single: bool) -> BlockGradients:
        return ScreenedGradients(call, needs, single=single)


class SavedTiles(NamedTuple):
    """`Screened` of a block in tensors of sizes known beforehand, as a compiled op's outputs must be."""

    sizes: Tensor  # [5] int64 on the CPU: part_rows, parts, columns, live, used; zeros: the block is exact
    columns: Tensor
    places: Tensor
    column_parts: Tensor
    tile_parts: Tensor
    tile_counts: Tensor
    lists: Tensor
    counts: Tensor
    q: Tensor
    q_by_place: Tensor
    scale: Tensor
    dropped: Tensor  # [3 K]

    @classmethod
    def empty(cls, kept: Tensor, V: int) -> SavedTiles:
        """Room for those of e [K, V]."""
        tiles, parts = -(-V // tail_tiles.TILE), tail_tiles.MOST_PARTS

        def numbers(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=kept.device)

        return cls(
            torch.zeros(5, dtype=torch.int64),
            numbers(V, dtype=torch.int64),
            numbers(V),
            numbers(V),
            numbers(tiles, MATRIX_ROWS),
            numbers(tiles),
            numbers(parts, tiles),
            numbers(parts + 1),
            numbers(MATRIX_ROWS, V, dtype=torch.float32),
            numbers(V, MATRIX_ROWS, dtype=torch.float32),
            numbers(MATRIX_ROWS, 1, dtype=torch.float32),
            numbers(3 * kept.shape[0], dtype=torch.float32),
        )

    def write(self, screened: Screened) -> None:
        """Write all fields but p, which lies in e's memory."""
        kept, (columns, _), live = screened.kept, screened.p.shape, screened.dropped.shape[1]
        self.sizes.copy_(torch.tensor([kept.part_rows, kept.parts, columns, live, screened.used]))
        for name in KeptTiles._fields[2:]:
            value = getattr(kept, name)
            getattr(self, name)[: len(value)].copy_(value)
        self.dropped[: 3 * live].copy_(screened.dropped.view(-1))

    def read(self, block: Block) -> Screened | None:
        """What was written; None: the block is exact."""
        part_rows, parts, columns, live, used = self.sizes.tolist()
        if not parts:
            return None
        tensors = {name: getattr(self, name) for name in KeptTiles._fields[2:]}
        tensors |= {"lists": self.lists[:parts], "counts": self.counts[: parts + 1]}
        p = memory_of_p(block, columns)
        assert p is not None
        kept = KeptTiles(part_rows, parts, **tensors)
        return Screened(kept, p, self.dropped[: 3 * live].view(3, live), used)


class ScreenedCall(EpilogueCall):
    """A call whose blocks are screened until it has given up."""

    def __init__(self, *arguments: Any, filled: bool, screen_tiles: Tiles) -> None:
        super().__init__(*arguments, filled=filled)
        self.screen_tiles = screen_tiles
        self.codes: WeightCodes | None = None
        self.exact = capturing(self.inputs.hidden)
        self.probed = False

    def forward(
        self, first: int, rows: int, stats: Tensor, kept: Tensor | None, state: Tensor | None = None
    ) -> Block:
        """A block after its forward pass. If it could be screened it has `screened`, and p in e's memory."""
        state = self.new_state(rows) if state is None else state
        memory = kept
        if memory is None:
            columns = 0 if self.exact else row_elements(self.V)
            memory = self.inputs.hidden.new_empty(rows, columns)[:, : self.V]
        block = self.gather(first, rows, memory, state, stats)
        live = self.live_rows(block)
        if live and not self.probed:
            self.probed = True
            self.exact = self.exact or self._is_flat(block.hidden[:live])
        if live and not self.exact:
            least = UNKEPT_PART if kept is None else tail_tiles.PART
            screened = self._screen(block, live, stats, least)
            if screened is not None:
                return block._replace(screened=screened)
        COUNTER.add(ScreenCounts(live, live))
        self.write_exact(block, stats, KEEP=kept is not None)
        return block

    def _is_flat(self, hidden: Tensor) -> bool:
        """Whether so many columns matter to some of these tokens that exact products are faster."""
        some = hidden[:: max(1, len(hidden) // EXACTLY_PROBED)][:EXACTLY_PROBED]
        logits = torch.empty(len(some), self.V, dtype=torch.float32, device=hidden.device)
        mm(some, self.weight.t(), logits)
        z = logits * self.scales.slope
        matter = z > z.logsumexp(1, keepdim=True) + math.log(EXACT_EPS)
        return int(matter.sum()) > LARGEST_SHARE * matter.numel()

    def _screen(self, block: Block, live: int, stats: Tensor, least: int) -> Screened | None:
        """Statistics of a gathered block of `live` tokens; None if it must be exact.

        least: tokens of a part.
        """
        if self.codes is None:
            self.codes = code_weight(self.weight)
        codes, options = code_hidden(block.hidden, self.codes), self.inputs.options
        to_base2 = abs(self.scales.slope) / math.log(2)
        noise = self.codes.noise(codes) * to_base2
        too_large = ~(noise[:live] * math.log(2) <= LARGEST_NOISE)
        unfit = on_host(too_large.any().int()[None])
        self._write_screened(block, codes, self.codes)
        self.merge(block, stats)
        eps = UNTAILED_EPS if options.tail_eps is None else options.tail_eps
        # e is rounded to 8 digits: it may be 0.006 too low, in powers of 2
        rule = KeepingRule(eps, least, MARGIN * noise + 0.01)
        kept, how_many = tail_tiles.select_tiles(self, block, live, stats, rule)
        counts = how_many()
        used = tail_tiles.kept_logits(kept, counts, live, self.V)
        p = memory_of_p(block, min(counts[-1] * tail_tiles.TILE, self.V))
        if unfit()[0] or used > DENSE * live * self.V or p is None:
            return None
        bounds = self.codes.bounds(codes) * to_base2 if options.check else None
        rest = self._rest(block, live, kept, bounds, eps)
        partial = self._write_p(block, live, kept, p)
        dropped = torch.empty(3, live, dtype=torch.float32, device=stats.device)
        sizes = (block.first, block.rows, live, self.N, kept.part_rows, kept.lists.shape[1])
        launch(
            _exact_kernels().merge_exact_kernel,
            -(-live // MERGE_ROWS),
            (rest, partial, kept.lists, kept.counts, block.ids, self.order, block.state, stats, dropped),
            (*sizes, partial.shape[1], len(rest)),
            FULL=not options.lean,
            ROWS=MERGE_ROWS,
            TILES=32,
        )
        open_columns = 0 if bounds is None else int(rest[:, 2].sum())
        COUNTER.add(ScreenCounts(live, 0, used, open_columns))
        return Screened(kept, p, dropped, used)

    def _write_screened(self, block: Block, hidden: GpuCodes, weight: WeightCodes) -> None:
        """Write the tiles' numbers and e, by the 8-bit kernel."""
        tiles, rows, options = self.screen_tiles, weight.rows, self.inputs.options
        width, programs = weight.rotation.width, tiles.per_sm * self.multiprocessors
        descriptors = (
            descriptor(hidden.codes, tiles.bm, tiles.bk),
            descriptor(rows.codes, tiles.bn, tiles.bk),
            descriptor(hidden.low, tiles.bm, hidden.low.shape[1]),
            descriptor(rows.low, tiles.bn, rows.low.shape[1]),
            descriptor(block.kept, tiles.bm, tiles.bn // tiles.parts),
        )
        constants = tiles.constants()
        del constants["FLATTEN"]
        launch(
            _gemm_kernels().screened_kernel,
            programs,
            (*descriptors, hidden.scales, rows.scales, block.ids, self.order, block.state),
            (block.first, block.rows, self.N, self.V, width, self.scales.outer),
            KEPT_SCALE=self.kept_scale,
            ENTROPY=not options.lean,
            MEAN=not options.lean,
            PROGRAMS=programs,
            **constants,
        )

    def _rest(self, block: Block, live: int, kept: KeptTiles, bounds: Tensor | None, eps: float) -> Tensor:
        """Sums [slices, 3, live] over the columns that are not kept."""
        grid, bn = -(-live // REST.rows), self.tiles.kept.bn
        width = -(-self.V // -(-PROGRAMS // grid) // bn) * bn
        slices = -(-self.V // width)
        rest = torch.empty(slices, 3, live, dtype=torch.float32, device=block.state.device)
        launch(
            _exact_kernels().rest_kernel,
            (grid, slices),
            (block.kept, block.state, kept.column_parts, bounds, rest),
            (block.rows, live, self.V, kept.part_rows, width, block.kept.stride(0), eps),
            FULL=not self.inputs.options.lean,
            KEPT_SCALE=self.kept_scale,
            BN=bn,
            COLUMNS=min(REST.columns, bn),
            ROWS=REST.rows,
            STAGES=REST.stages,
            num_warps=REST.warps,
        )
        return rest

    def _write_p(self, block: Block, live: int, kept: KeptTiles, p: Tensor) -> Tensor:
        """p [columns, line] of the kept tiles, and their numbers [3, tiles, rows]."""
        tiles, columns = EXACT_TILES, len(p)
        kept_tiles = -(-columns // tail_tiles.TILE)
        weight = self.weight.index_select(0, kept.columns[:columns])
        partial = torch.empty(3, kept_tiles, block.rows, dtype=torch.float32, device=p.device)
        descriptors = (
            descriptor(weight, tail_tiles.TILE, tiles.bk),
            descriptor(block.hidden[:live], tiles.bm, tiles.bk),
            descriptor(p, tail_tiles.TILE, tiles.bm // 4),
        )
        sizes = (block.rows, live, self.V, self.H, kept.part_rows, kept.parts)
        launch(
            _exact_kernels().exact_kernel,
            self.multiprocessors,
            (*descriptors, kept.columns, kept.lists, kept.counts, block.ids, block.state, partial),
            (*sizes, kept.lists.shape[1], kept_tiles, self.scales.outer),
            FULL=not self.inputs.options.lean,
            TILE=tail_tiles.TILE,
            BM=tiles.bm,
            BK=tiles.bk,
            PROGRAMS=self.multiprocessors,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        return partial


class ScreenedGradients(TailGradients):
    """Gradients of a call, a block at a time; those of a block that was not screened are the tail's."""

    def factors(self, block: Block, stats: Tensor, coefficients: TokenCoefficients) -> Factors | None:
        if block.screened is None:
            return super().factors(block, stats, coefficients)
        call, screened = self.call, block.screened
        kept, live = screened.kept, screened.dropped.shape[1]
        tail_tiles.count_kept(screened.used, live, call.V)
        table = call.coefficient_table(block, live, stats, coefficients)
        sums = torch.zeros(MATRIX_ROWS, live, dtype=torch.float32, device=stats.device)
        sizes = (block.first, live, call.N, call.V, kept.part_rows, kept.parts)
        launch(
            _exact_kernels().finish_kernel,
            (-(-len(screened.p) // tail_tiles.TILE), -(-live // FINISH_ROWS)),
            (
                *(screened.p, screened.dropped, block.ids, stats, call.order, table.values),
                *(kept.columns, kept.column_parts, sums),
            ),
            (
                *(*sizes, live, screened.p.stride(0)),
                *(table.label_smoothing, table.z_loss, call.scales.slope),
            ),
            CROSS_ENTROPY=table.cross_entropy,
            PLOGP=not table.cross_entropy and not call.inputs.options.lean,
            TILE=tail_tiles.TILE,
            ROWS=FINISH_ROWS,
        )
        towards = stats.new_empty(0)
        if self.needs.hidden:
            towards = thin_product(kept.q, call.weight) * kept.scale
        return TailFactors(block.first, screened.p[:, :live], block.hidden[:live], sums, towards, kept)


def memory_of_p(block: Block, columns: int) -> Tensor | None:
    """p [columns, line] in the memory of the block's e; None if it does not fit."""
    line, e = -(-block.rows // 16) * 16, block.kept  # TMA takes rows of whole 16 bytes
    room = e.untyped_storage().nbytes() // e.element_size() - e.storage_offset()
    return e.as_strided((columns, line), (line, 1)) if columns * line <= room else None


def _gemm_kernels():
    from . import screen_gemm_triton  # Triton is absent on macOS and Windows

    return screen_gemm_triton


def _exact_kernels():
    from . import screen_exact_triton  # Triton is absent on macOS and Windows

    return screen_exact_triton
