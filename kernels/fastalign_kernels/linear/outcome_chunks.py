"""The loop of a top-K distillation: chunks of tokens through one tile of logits.

For each chunk: one GEMM for the logits, a gather of the K outcomes' logits, the statistics of the tail's
logits, the gradient kernel for the tail, a scatter of the K outcomes' gradients into its output, and a GEMM
each for dX and dW. The K outcomes take no GEMM and no atomic addition of their own. On a GPU the loop is that
of token tiles.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..softmax.rows import (
    Coefficient,
    Stat,
    Transform,
    accumulator_dtype,
    row_stats,
    slope_ref,
    transform_ref,
)
from .accumulate import ColumnGrads, GradAccumulator
from .chunks import ChunkRunner, Operands, TokenChunk, new_stats, planned_chunks, run_chunks
from .engine import Gradients, empty_gradients
from .engines import engine_context
from .inputs import HeadInputs, NeedsGrad
from .outcomes import DIVERGENCES, Teacher, first_outcome, with_floor
from .sharded import Shards, stats_of_no_rows
from .sharded_collectives import whole_outcomes

CAPPED_BYTES = 4 * 2**20  # of transformed logits that are in memory together under a softcap


class Distillation(NamedTuple):
    """What the loss takes beside the head."""

    teacher_ids: Tensor  # [N, K] int64; -1: padding
    teacher_logp: Tensor  # [N, K]
    divergence: str
    scale: Tensor | None = None  # [N], what each token's divergence is multiplied by; gradients need it

    def teacher(self, inputs: HeadInputs, tokens: Tensor | slice) -> Teacher:
        return Teacher.of(self.teacher_ids[tokens], self.teacher_logp[tokens], inputs.vocab_size)


def divergences_and_gradients(
    inputs: HeadInputs, loss: Distillation, needs: NeedsGrad
) -> tuple[Tensor, Gradients]:
    """The divergence of each token [N], not scaled, and the gradients of the scaled sum."""
    accumulator = accumulator_dtype(inputs.hidden.dtype)
    losses = inputs.hidden.new_zeros(inputs.hidden.shape[0], dtype=accumulator)
    with engine_context(inputs):
        runner = ChunkRunner(inputs, Operands.of(inputs), new_stats(inputs))
        sums = GradAccumulator(inputs, runner.operands, needs)
        for chunk in run_chunks(runner, planned_chunks(inputs, needs), fill_stats=False):
            teacher = loss.teacher(inputs, chunk.tokens)
            columns = _OutcomeColumns.of(teacher, inputs.options.shards)
            outcomes = _Outcomes.of(chunk, teacher, columns, runner)
            log_q = with_floor(loss.divergence, teacher, inputs.vocab_size)
            divergence, grads = DIVERGENCES[loss.divergence](outcomes.logp, log_q)
            counted = chunk.ids >= 0
            losses[chunk.tokens] = torch.where(counted, divergence, 0.0).to(accumulator)
            if any(needs):
                assert loss.scale is not None
                grads = torch.where(counted[:, None], grads * loss.scale[chunk.tokens][:, None], 0.0)
                _add(sums, chunk, columns, outcomes, grads)
        gradients = sums.finish() if any(needs) else empty_gradients(inputs, needs)
    return losses, gradients


class _OutcomeColumns(NamedTuple):
    """Where a teacher's outcomes are among the rows of the weight on this rank."""

    columns: Tensor  # [C, K]; padding, and outcomes of other ranks, repeat the row's first
    owned: Tensor  # [C, K] bool: an outcome of this rank
    rows: Tensor | None  # [C, 1] bool: tokens that have one here; None: all that count

    @classmethod
    def of(cls, teacher: Teacher, shards: Shards | None) -> _OutcomeColumns:
        if shards is None:
            return cls(teacher.columns, teacher.given, None)
        owned = teacher.given & shards.owned(teacher.columns)
        local = torch.where(owned, teacher.columns - shards.first, 0)
        columns = torch.where(owned, local, first_outcome(owned, local))
        return cls(columns, owned, owned.any(-1, keepdim=True))

    def part(self, tokens: slice) -> _OutcomeColumns:
        rows = None if self.rows is None else self.rows[tokens]
        return _OutcomeColumns(self.columns[tokens], self.owned[tokens], rows)

    def hide(self, z: Tensor, value: float) -> Tensor:
        """Write `value` over the outcomes' columns of z [C, V]."""
        if self.rows is None:
            return z.scatter_(1, self.columns, value)
        return z.scatter_(1, self.columns, torch.where(self.rows, value, z.gather(1, self.columns)))


class _Outcomes(NamedTuple):
    """The student's outcomes of a chunk."""

    logp: Tensor  # [C, K + 1] fp64, the tail's last
    slopes: Tensor  # [C, K] fp64, dz/dx of the K logits
    tail: Tensor  # [7, C], statistics of the tail's logits

    @classmethod
    def of(
        cls, chunk: TokenChunk, teacher: Teacher, columns: _OutcomeColumns, runner: ChunkRunner
    ) -> _Outcomes:
        """The outcomes of a chunk. A sharded head needs one all-gather.

        Overwrites the chunk's K logits, unless the softcap needs them.
        """
        inputs, bias = runner.inputs, runner.operands.bias
        transform, shards = inputs.options.transform, inputs.options.shards
        raw = teacher.logp.new_zeros(teacher.columns.shape)
        if chunk.logits.shape[1]:
            raw += chunk.logits.gather(1, columns.columns)
            raw += 0 if bias is None else bias[columns.columns]
        tail = _tail_stats(chunk, columns, bias, transform)
        if shards is not None:
            raw = whole_outcomes(raw, teacher.columns, tail, shards, inputs.group)
        z = transform_ref(raw, None, transform).masked_fill(~teacher.given, -math.inf)
        slopes = slope_ref(raw, None, transform)
        empty = tail[Stat.MAX] == -math.inf
        log_sum = torch.where(empty, 0.0, tail[Stat.LOGSUM])
        tail[Stat.MAX] = torch.where(empty, 0.0, tail[Stat.MAX])  # exp(-inf - 0) is 0, exp(-inf + inf) NaN
        tail[Stat.LOGSUM] = log_sum
        tail_max = torch.where(empty, -math.inf, tail[Stat.MAX])[:, None]
        masses = torch.cat([z, tail_max.double() + log_sum[:, None]], 1)
        return cls(masses.log_softmax(1), slopes, tail)


def _tail_stats(
    chunk: TokenChunk, columns: _OutcomeColumns, bias: Tensor | None, transform: Transform
) -> Tensor:
    """The statistics [7, C] of the logits outside `columns`."""
    logits, ids = chunk.logits, chunk.ids
    if not logits.shape[1]:
        return stats_of_no_rows(ids.numel(), logits)
    if not transform.softcap and transform.logit_scale:
        columns.hide(logits, math.copysign(math.inf, -transform.logit_scale))
        return row_stats(logits[None], ids, bias, transform)
    # No raw logit has a probability of 0 under a softcap: z is at least -softcap / temperature.
    rows = max(1, CAPPED_BYTES // (logits.shape[1] * logits.element_size()))
    if logits.is_cuda:
        rows = max(rows, -(-logits.shape[0] // 4))
    parts = []
    for begin in range(0, logits.shape[0], rows):
        part = slice(begin, begin + rows)
        z = columns.part(part).hide(transform_ref(logits[part], bias, transform), -math.inf)
        parts.append(row_stats(z[None], ids[part], None, Transform()))
    return torch.cat(parts, 1)


def _add(
    sums: GradAccumulator, chunk: TokenChunk, columns: _OutcomeColumns, outcomes: _Outcomes, grads: Tensor
) -> None:
    """Add the gradients of a chunk for d loss / da [C, K + 1]."""
    coefficients = torch.zeros_like(outcomes.tail[: len(Coefficient)])
    coefficients[Coefficient.PROB] = grads[:, -1]
    values = grads[:, :-1] * outcomes.slopes
    # Padding repeats the first outcome's column, hence its value.
    values = torch.where(columns.owned, values, first_outcome(columns.owned, values))
    replaced = ColumnGrads(columns.columns, values, columns.rows)
    sums.add_dense(chunk._replace(stats=outcomes.tail), coefficients, replaced)
