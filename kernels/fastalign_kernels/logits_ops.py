"""The ops of logits.py: statistics of tokens and their gradient, and a reduced cross-entropy with its own.

Every op takes logits [B, T, V] with unit stride over V, ids [B*T] with -1 where ignored, and numbers in nats.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import native
from .autograd import NamedGrads, register_loss_op, register_op
from .namespace import NAMESPACE
from .ordered_sum import ordered_sum
from .softmax.rows import (
    NeedsStats,
    RowInputs,
    Stat,
    TokenLoss,
    Transform,
    accumulator_dtype,
    coefficients,
    row_grad,
    row_loss,
    row_stats,
)
from .torch_func import traced


def token_loss(table: Tensor, label_smoothing: float, z_loss: float) -> Tensor:
    """Cross-entropy [N] of each row of a statistics table [7, N], in nats; formula at the top of
    logits.py."""
    loss = -table[Stat.LOGP]
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * table[Stat.MEAN_LOGP]
    return loss + z_loss * table[Stat.LSE] ** 2 if z_loss else loss


def _table_forward(
    logits: Tensor, ids: Tensor, softcap: float, temperature: float, needs: list[bool], inplace_backward: bool
) -> Tensor:
    """Statistics [7, B*T] of logits [B, T, V]; needs: the fields of NeedsStats."""
    return row_stats(logits, ids, None, Transform(1.0, softcap, temperature), NeedsStats(*needs))


def _fake_table(logits, ids, softcap, temperature, needs, inplace_backward):
    return logits.new_empty(len(Stat), ids.shape[0], dtype=accumulator_dtype(logits.dtype))


def _token_table_grad(
    logits: Tensor,
    ids: Tensor,
    stats: Tensor,
    coefficients: Tensor,
    softcap: float,
    temperature: float,
    needs: list[bool],
) -> Tensor:
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    transform = Transform(1.0, softcap, temperature)
    row_grad(logits, ids, None, transform, stats, coefficients, out, NeedsStats(*needs))
    return out


_token_table_grad_op = torch.library.custom_op(
    f"{NAMESPACE}::token_table_grad", _token_table_grad, mutates_args=()
)


@_token_table_grad_op.register_fake
def _fake_table_grad(logits, ids, stats, coefficients, softcap, temperature, needs):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output) -> None:
    logits, ids, ctx.softcap, ctx.temperature, ctx.needs, ctx.inplace_backward = inputs
    ctx.save_for_backward(logits, ids, output)


def _backward(ctx, saved: Sequence[Tensor], grad: Tensor) -> NamedGrads:
    logits, ids, stats = saved
    of_rows = coefficients(grad, stats, logits.shape[-1])
    arguments = (ids, stats, of_rows, ctx.softcap, ctx.temperature, ctx.needs)
    if traced(grad):
        return {"logits": _token_table_grad_op(logits, *arguments)}
    if not ctx.inplace_backward:
        return {"logits": _token_table_grad(logits, *arguments)}
    grad_logits = logits.detach()
    transform = Transform(1.0, ctx.softcap, ctx.temperature)
    row_grad(grad_logits, ids, None, transform, stats, of_rows, grad_logits, NeedsStats(*ctx.needs))
    torch.autograd.graph.increment_version(grad_logits)  # autograd refuses them if another node saved them
    return {"logits": grad_logits}


token_table = register_op(
    "token_table",
    _table_forward,
    _fake_table,
    save=_setup,
    backward=_backward,
    losses="cross_entropy, token_logprobs or token_stats",
)


def _loss_forward(
    logits: Tensor, ids: Tensor, scale: Tensor, options: list[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum over tokens of scale [B*T] times cross-entropy, the table [7, B*T], and gradients of logits
    [B, T, V] and scale.

    options: softcap, temperature, label_smoothing, z_loss.
    """
    softcap, temperature, label_smoothing, z_loss = options
    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    inputs = RowInputs(logits, ids, None, Transform(1.0, softcap, temperature))
    stats = row_loss(inputs, TokenLoss(scale.contiguous(), label_smoothing, z_loss), grad_logits)
    d_scale = token_loss(stats, label_smoothing, z_loss)
    return ordered_sum(d_scale * scale), stats, grad_logits, d_scale


def _fake_loss(logits, ids, scale, options):
    stats = logits.new_empty(len(Stat), ids.shape[0], dtype=accumulator_dtype(logits.dtype))
    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    return stats.new_empty(()), stats, grad_logits, stats.new_empty(ids.shape)


token_loss_op = register_loss_op(
    "token_loss", _loss_forward, _fake_loss, differentiable=("logits", "scale"), losses="cross_entropy"
)


def gradient_in_forward(logits: Tensor) -> bool:
    """Whether a kernel makes a reduced loss and its gradient in one launch, which reads the logits once.

    The upstream gradient, a scalar, scales the result in backward. fp16 rounds after scaling: the loss's
    scale is what saves small gradients from underflow.
    """
    return logits.is_cuda and not native.triton_missing and logits.dtype != torch.float16
