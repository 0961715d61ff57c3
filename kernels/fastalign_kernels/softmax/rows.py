"""One block of logits: statistics of its rows in one read, their gradient in one read and one write.

Each row x [V] of a block becomes z by the transform

    u = logit_scale * (x + bias),   c = softcap * tanh(u / softcap),   z = c / temperature,   P = softmax(z),

and yields the seven numbers of `Stat` (nats). Every loss of this package is a function of them, and its
gradient has the form

    dz[v] = onehot * [v == id] + P[v] * (prob + plogp * log P[v]) + uniform,   dx[v] = dz[v] * dz[v]/dx[v],

so there is one statistics kernel and one gradient kernel; `coefficients` turns upstream gradients into the
four numbers. A negative id marks an ignored row: it is not read, its statistics and its gradient are zero.

Bytes: the statistics read N*V*e. The gradient reads N*V*e and writes as much. There are three
implementations with the same arguments: Triton on a GPU, csrc/softmax/rows.h on a CPU, and the PyTorch
reference below. The reference is the specification, and it runs where the native library is missing.
"""

from __future__ import annotations

from enum import IntEnum
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import Kernels, accumulator_dtype, launches
from ..namespace import ops


class Stat(IntEnum):
    """Rows of the statistics table [7, N].

    csrc/softmax/rows.h and softmax/rows_triton.py write them in this order.
    """

    LOGP = 0  # log P[id]
    MEAN_LOGP = 1  # mean over v of log P[v], for label smoothing
    ENTROPY = 2  # -sum P log P
    LSE = 3  # log sum exp z = MAX + LOGSUM
    MAX = 4  # max z
    LOGSUM = 5  # log sum exp(z - MAX): kept apart because the sum LSE rounds to 1e-3 at |z| = 1e4
    TOP1 = 6  # 1 where no logit exceeds the id's, else 0


class Coefficient(IntEnum):
    """Rows of the gradient kernel's table [4, N]."""

    ONEHOT = 0
    PROB = 1
    PLOGP = 2
    UNIFORM = 3


class Transform(NamedTuple):
    """The numbers by which raw logits become the z of the softmax; softcap 0 means none."""

    logit_scale: float = 1.0
    softcap: float = 0.0
    temperature: float = 1.0


class NeedsStats(NamedTuple):
    """Which of the statistics that cost extra work are used. A GPU's kernels leave the rest 0."""

    mean_logp: bool = True
    entropy: bool = True


ALL_STATS = NeedsStats()


class RowInputs(NamedTuple):
    """A block of logits as the kernels take it."""

    logits: Tensor  # [B, T, V], unit stride over V
    ids: Tensor  # [B*T] int64; negative: ignored
    bias: Tensor | None  # [V], of the logits' dtype
    transform: Transform


class TokenLoss(NamedTuple):
    """Cross-entropy's gradient, which follows from a row's own statistics."""

    scale: Tensor  # [N], what each token's loss is multiplied by
    label_smoothing: float
    z_loss: float


def coefficients(grad: Tensor, stats: Tensor, vocab_size: int) -> Tensor:
    """The gradient kernel's [4, N] (onehot, prob, plogp, uniform) for upstream gradients [7, N] of the
    statistics.

    d logp = onehot - P;  d mean_logp = 1/V - P;  d lse = P;  d entropy = -P (log P + entropy).
    MAX, LOGSUM and TOP1 carry no gradient.
    """
    if launches(grad) and grad.dtype == stats.dtype == torch.float32:
        return COEFFICIENTS.select(grad).coefficients(grad, stats, vocab_size)
    return _coefficients(grad, stats, vocab_size)


def _coefficients(grad: Tensor, stats: Tensor, vocab_size: int) -> Tensor:
    logp, mean_logp, entropy, lse = grad[Stat.LOGP], grad[Stat.MEAN_LOGP], grad[Stat.ENTROPY], grad[Stat.LSE]
    prob = lse - logp - mean_logp - entropy * stats[Stat.ENTROPY]
    return torch.stack([logp, prob, -entropy, mean_logp / vocab_size])


COEFFICIENTS = Kernels(
    SimpleNamespace(coefficients=_coefficients), native=None, triton=".softmax.coefficients_triton"
)


def loss_coefficients(loss: TokenLoss, stats: Tensor, vocab_size: int) -> Tensor:
    """The gradient kernel's [4, N] for scale (-(1 - e) logp - e mean_logp + z_loss lse^2), e =
    label_smoothing."""
    grad = torch.zeros_like(stats)
    grad[Stat.LOGP] = (loss.label_smoothing - 1) * loss.scale
    grad[Stat.MEAN_LOGP] = -loss.label_smoothing * loss.scale
    grad[Stat.LSE] = 2 * loss.z_loss * stats[Stat.LSE] * loss.scale
    return coefficients(grad, stats, vocab_size)


def row_stats(
    logits: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    transform: Transform,
    needs: NeedsStats = ALL_STATS,
) -> Tensor:
    """Statistics [7, B*T] of logits [B, T, V] (unit stride over V) for ids [B*T] int64; bias [V] of the
    logits' dtype."""
    stats = torch.empty(len(Stat), ids.numel(), dtype=accumulator_dtype(logits.dtype), device=logits.device)
    KERNELS.select(logits).row_stats(RowInputs(logits, ids, bias, transform), stats, needs)
    return stats


def row_grad(
    logits: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    transform: Transform,
    stats: Tensor,
    coefficients: Tensor,
    out: Tensor,
    needs: NeedsStats = ALL_STATS,
) -> None:
    """Write d loss / d logits into out [B, T, V]: `logits` itself, or on a GPU also another tensor of a lower
    dtype.

    Without needs.entropy PLOGP must be 0: a GPU's kernel does not read it.
    """
    inputs = RowInputs(logits, ids, bias, transform)
    KERNELS.select(logits).row_grad(inputs, stats, coefficients, out, needs)


def row_loss(inputs: RowInputs, loss: TokenLoss, out: Tensor) -> Tensor:
    """The statistics that the token losses need, and d loss / d logits into out [B, T, V], in one launch.

    For GPUs: the native library has no such kernel. `inputs.bias` is None.
    """
    logits, ids = inputs.logits, inputs.ids
    stats = torch.empty(len(Stat), ids.numel(), dtype=accumulator_dtype(logits.dtype), device=logits.device)
    needs = NeedsStats(mean_logp=loss.label_smoothing != 0, entropy=False)
    KERNELS.select(logits).row_loss(inputs, loss, stats, out, needs)
    return stats


def transform_ref(logits: Tensor, bias: Tensor | None, transform: Transform) -> Tensor:
    """z [..., V] of raw logits, in fp32 (fp64 for fp64)."""
    z = logits.to(accumulator_dtype(logits.dtype))
    if bias is not None:
        z = z + bias
    z = z * transform.logit_scale
    if transform.softcap:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    return z / transform.temperature


def slope_ref(logits: Tensor, bias: Tensor | None, transform: Transform) -> Tensor:
    """dz/dx [..., V] of raw logits, in fp32 (fp64 for fp64)."""
    x = logits.to(accumulator_dtype(logits.dtype))
    if not transform.softcap:
        return torch.full_like(x, transform.logit_scale / transform.temperature)
    u = (x if bias is None else x + bias) * (transform.logit_scale / transform.softcap)
    t = (
        -2 * u.abs()
    ).exp()  # 1 - tanh^2 = 4 t / (1 + t)^2: the difference would have no digits left where tanh is near 1
    return 4 * t / (1 + t) ** 2 * (transform.logit_scale / transform.temperature)


def row_stats_ref(logits: Tensor, ids: Tensor, bias: Tensor | None, transform: Transform) -> Tensor:
    """The specification of `row_stats`, differentiable by autograd."""
    z = transform_ref(logits, bias, transform).flatten(0, -2)
    row_max = z.detach().amax(-1)
    logsum = (z - row_max[:, None]).exp().sum(-1).log()
    logp = z - row_max[:, None] - logsum[:, None]
    at_id = z.gather(-1, ids.clamp(min=0)[:, None])[:, 0]
    entropy = -(logp.exp() * logp.clamp(min=-1e30)).sum(-1)  # a masked logit counts 0 * -1e30, not 0 * -inf
    stats = torch.stack(
        [
            at_id - row_max - logsum,
            logp.mean(-1),
            entropy,
            row_max + logsum,
            row_max,
            logsum.detach(),
            (at_id == row_max).to(z.dtype),
        ]
    )
    return torch.where(ids >= 0, stats, torch.zeros_like(stats))


def row_grad_ref(
    logits: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    transform: Transform,
    stats: Tensor,
    coefficients: Tensor,
) -> Tensor:
    """The specification of `row_grad`: d loss / d logits [B, T, V] in the accumulator's dtype."""
    z = transform_ref(logits, bias, transform)
    per_row = (*logits.shape[:2], 1)
    onehot, prob, plogp, uniform = (c.view(per_row) for c in coefficients)
    logp = z - stats[Stat.MAX].view(per_row) - stats[Stat.LOGSUM].view(per_row)
    grad = logp.exp() * (prob + plogp * logp.clamp(min=-1e30)) + uniform
    grad.scatter_add_(-1, ids.clamp(min=0).view(per_row), onehot)
    return torch.where(
        (ids >= 0).view(per_row), grad * slope_ref(logits, bias, transform), torch.zeros_like(grad)
    )


def _row_stats(inputs: RowInputs, stats: Tensor, needs: NeedsStats = ALL_STATS) -> None:
    stats.copy_(row_stats_ref(*inputs))


def _row_grad(
    inputs: RowInputs, stats: Tensor, coefficients: Tensor, out: Tensor, needs: NeedsStats = ALL_STATS
) -> None:
    out.copy_(row_grad_ref(*inputs, stats, coefficients))


def _row_loss(inputs: RowInputs, loss: TokenLoss, stats: Tensor, out: Tensor, needs: NeedsStats) -> None:
    _row_stats(inputs, stats)
    _row_grad(inputs, stats, loss_coefficients(loss, stats, inputs.logits.shape[-1]), out)


def _native_row_stats(inputs: RowInputs, stats: Tensor, needs: NeedsStats = ALL_STATS) -> None:
    logits, ids, bias, transform = inputs
    ops.row_stats(logits, ids, bias, *transform, stats)


def _native_row_grad(
    inputs: RowInputs, stats: Tensor, coefficients: Tensor, out: Tensor, needs: NeedsStats = ALL_STATS
) -> None:
    logits, ids, bias, transform = inputs
    ops.row_grad(logits, ids, bias, *transform, stats, coefficients, out)


KERNELS = Kernels(
    SimpleNamespace(row_stats=_row_stats, row_grad=_row_grad, row_loss=_row_loss),
    native=SimpleNamespace(row_stats=_native_row_stats, row_grad=_native_row_grad),
    triton=".softmax.rows_triton",
)
