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

CAPPED_BYTES = 4 * 2**20  # of transformed logits that are in memory together under a softcap


class Distillation(NamedTuple):
    """What the loss takes beside the head."""

    teacher_ids: Tensor  # [N, K] int64; -1: padding
    teacher_logp: Tensor  # [N, K]
    scale: Tensor  # [N], what each token's divergence is multiplied by; for gradients alone
    divergence: str

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
            outcomes = _Outcomes.of(chunk, teacher, runner.operands.bias, inputs.options.transform)
            log_q = with_floor(loss.divergence, teacher, inputs.vocab_size)
            divergence, grads = DIVERGENCES[loss.divergence](outcomes.logp, log_q)
            counted = chunk.ids >= 0
            losses[chunk.tokens] = torch.where(counted, divergence, 0.0).to(accumulator)
            if any(needs):
                grads = torch.where(counted[:, None], grads * loss.scale[chunk.tokens][:, None], 0.0)
                _add(sums, chunk, teacher, outcomes, grads)
        gradients = sums.finish() if any(needs) else empty_gradients(inputs, needs)
    return losses, gradients


class _Outcomes(NamedTuple):
    """The student's outcomes of a chunk."""

    logp: Tensor  # [C, K + 1] fp64, the tail's last
    slopes: Tensor  # [C, K] fp64, dz/dx of the K logits
    tail: Tensor  # [7, C], statistics of the tail's logits

    @classmethod
    def of(cls, chunk: TokenChunk, teacher: Teacher, bias: Tensor | None, transform: Transform) -> _Outcomes:
        """Also overwrites the chunk's K logits, unless the softcap needs them."""
        raw = chunk.logits.gather(1, teacher.columns).double()
        raw_bias = None if bias is None else bias[teacher.columns]
        z = transform_ref(raw, raw_bias, transform).masked_fill(~teacher.given, -math.inf)
        slopes = slope_ref(raw, raw_bias, transform)
        tail = _tail_stats(chunk, teacher.columns, bias, transform)
        empty = tail[Stat.MAX] == -math.inf
        log_sum = torch.where(empty, 0.0, tail[Stat.LOGSUM])
        tail[Stat.MAX] = torch.where(empty, 0.0, tail[Stat.MAX])  # exp(-inf - 0) is 0, exp(-inf + inf) NaN
        tail[Stat.LOGSUM] = log_sum
        tail_max = torch.where(empty, -math.inf, tail[Stat.MAX])[:, None]
        masses = torch.cat([z, tail_max.double() + log_sum[:, None]], 1)
        return cls(masses.log_softmax(1), slopes, tail)


def _tail_stats(chunk: TokenChunk, columns: Tensor, bias: Tensor | None, transform: Transform) -> Tensor:
    """The statistics [7, C] of the logits outside `columns` [C, K]."""
    logits, ids = chunk.logits, chunk.ids
    if not transform.softcap and transform.logit_scale:
        logits.scatter_(1, columns, math.copysign(math.inf, -transform.logit_scale))
        return row_stats(logits[None], ids, bias, transform)
    # No raw logit has a probability of 0 under a softcap: z is at least -softcap / temperature.
    rows = max(1, CAPPED_BYTES // (logits.shape[1] * logits.element_size()))
    if logits.is_cuda:
        rows = max(rows, -(-logits.shape[0] // 4))
    parts = []
    for begin in range(0, logits.shape[0], rows):
        part = slice(begin, begin + rows)
        z = transform_ref(logits[part], bias, transform).scatter_(1, columns[part], -math.inf)
        parts.append(row_stats(z[None], ids[part], None, Transform()))
    return torch.cat(parts, 1)


def _add(
    sums: GradAccumulator, chunk: TokenChunk, teacher: Teacher, outcomes: _Outcomes, grads: Tensor
) -> None:
    """Add the gradients of a chunk for d loss / da [C, K + 1]."""
    coefficients = torch.zeros_like(outcomes.tail[: len(Coefficient)])
    coefficients[Coefficient.PROB] = grads[:, -1]
    values = grads[:, :-1] * outcomes.slopes
    # Padding repeats the first outcome's column, hence its value.
    values = torch.where(teacher.given, values, first_outcome(teacher.given, values))
    sums.add_dense(chunk._replace(stats=outcomes.tail), coefficients, ColumnGrads(teacher.columns, values))
