"""The engine for CPUs: chunks of tokens through one tile of logits.

For each chunk: one GEMM for the logits, one kernel for the statistics, one kernel that turns the logits into
dlogits in place, and a GEMM each for dX and dW. Memory beyond the gradients is the workspace, however many
tokens there are. With `tail_eps` the backward GEMMs take only the columns that tail_columns.py keeps. Under
graph capture the host cannot know their number, so all columns take part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from .accumulate import GradAccumulator
from .chunks import (
    ChunkRunner,
    Operands,
    TokenChunk,
    capturing,
    new_stats,
    planned_chunks,
    run_chunks,
    run_groups,
    screen_statistics,
)
from .engine import Engine, Gradients, SequenceCoefficients, Sequences, TokenCoefficients
from .inputs import HeadInputs, NeedsGrad
from .sequence_chunks import group_chunks
from .tail_columns import chunks_with_columns
from .tail_saved import SavedColumns, add_saved, empty_saved_columns, save_columns


def _has_tail(inputs: HeadInputs, needs: NeedsGrad) -> bool:
    return inputs.options.tail_eps is not None and any(needs) and not capturing(inputs.hidden)


class TokenTiles(Engine):
    """Saves nothing without a tail: `gradients` then recomputes the logits."""

    def saves(self, inputs: HeadInputs, needs: NeedsGrad) -> bool:
        return _has_tail(inputs, needs)

    def statistics(self, inputs: HeadInputs, needs: NeedsGrad) -> tuple[Tensor, list[Tensor]]:
        stats = new_stats(inputs)
        runner = ChunkRunner(inputs, Operands.of(inputs), stats)
        if runner.screen is not None and not any(needs):
            screen_statistics(runner, runner.screen)
            return stats, []
        if self.saves(inputs, needs):
            chunks = run_chunks(runner, planned_chunks(inputs, needs), fill_stats=True)
            return stats, list(save_columns(inputs, runner.operands, chunks, needs))
        for _ in run_chunks(runner, planned_chunks(inputs, NeedsGrad()), fill_stats=True):
            pass
        return stats, []

    def empty_saved(self, inputs: HeadInputs, needs: NeedsGrad) -> list[Tensor]:
        return list(empty_saved_columns(inputs, needs)) if self.saves(inputs, needs) else []

    def gradients(
        self,
        inputs: HeadInputs,
        stats: Tensor,
        saved: list[Tensor],
        coefficients: Tensor,
        needs: NeedsGrad,
    ) -> Gradients:
        runner = ChunkRunner(inputs, Operands.of(inputs), stats)
        sums = GradAccumulator(inputs, runner.operands, needs)
        if saved:
            recompute = add_saved(inputs, sums, stats, SavedColumns(*saved), coefficients)
            rows = max((tokens.numel() for tokens in recompute), default=0)
            chunks = run_chunks(runner, recompute, fill_stats=False, rows=rows)
        else:
            chunks = run_chunks(runner, planned_chunks(inputs, needs), fill_stats=False)
        _accumulate(inputs, sums, chunks, lambda chunk: coefficients[:, chunk.tokens].contiguous())
        return sums.finish()

    def statistics_and_gradients(
        self, inputs: HeadInputs, token_coefficients: TokenCoefficients, needs: NeedsGrad
    ) -> tuple[Tensor, Gradients]:
        """One pass: a chunk's gradients are computed while its logits exist."""
        stats = new_stats(inputs)
        runner = ChunkRunner(inputs, Operands.of(inputs), stats)
        sums = GradAccumulator(inputs, runner.operands, needs)
        chunks = run_chunks(runner, planned_chunks(inputs, needs), fill_stats=True)
        _accumulate(inputs, sums, chunks, lambda chunk: token_coefficients(chunk.stats, chunk.tokens))
        return stats, sums.finish()

    def of_sequences(
        self,
        inputs: HeadInputs,
        coefficients: SequenceCoefficients,
        sequences: Sequences | None,
        needs: NeedsGrad,
    ) -> tuple[Tensor, Gradients]:
        """One pass; on a CPU one group of rows after another, whose lengths are known without waiting."""
        if sequences is None or inputs.ids.is_cuda or _has_tail(inputs, needs):
            return super().of_sequences(inputs, coefficients, sequences, needs)
        stats = new_stats(inputs)
        runner = ChunkRunner(inputs, Operands.of(inputs), stats)
        sums = GradAccumulator(inputs, runner.operands, needs)
        chunks = run_groups(runner, group_chunks(inputs, sequences, needs))
        _accumulate(inputs, sums, chunks, lambda chunk: coefficients(stats, chunk.tokens))
        return stats, sums.finish()


def _accumulate(
    inputs: HeadInputs,
    sums: GradAccumulator,
    chunks: Iterable[TokenChunk],
    coefficients: Callable[[TokenChunk], Tensor],
) -> None:
    """Add the gradients of all chunks; `coefficients` gives the gradient kernel's [4, C]."""
    if not _has_tail(inputs, sums.needs):
        for chunk in chunks:
            sums.add_dense(chunk, coefficients(chunk))
        return
    parts = chunks_with_columns(inputs, sums.operands, chunks, coefficients)
    for part, part_coefficients, columns in parts:
        if columns is None:
            sums.add_dense(part, part_coefficients)
        else:
            sums.add_kept(part, part_coefficients, columns)


TOKEN_TILES = TokenTiles()
