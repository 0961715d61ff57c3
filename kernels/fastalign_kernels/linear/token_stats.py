"""The statistics of a head's tokens for any upstream gradient: linear/cross_entropy.py's ways no_grad and general."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..autograd import InputGrads, first_order
from ..softmax.rows import Stat, Transform, accumulator_dtype, coefficients
from .accumulate import fake_gradients
from .tail_saved import KeptState, empty_state, sweep_keeping, sweep_kept
from .token_tiles import Head, capturing, sweep


@torch.library.custom_op("fastalign::head_table", mutates_args=())
def _head_table(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
    workspace_mib: float | None,
    tail_eps: float | None,
) -> Tensor:
    head = Head(
        hidden, weight, ids, bias, Transform(logit_scale, softcap, temperature), workspace_mib, tail_eps
    )
    return sweep(head, None, None, (False, False, False))[0]


@_head_table.register_fake
def _(hidden, weight, ids, bias, logit_scale, softcap, temperature, workspace_mib, tail_eps):
    return hidden.new_empty(len(Stat), hidden.shape[0], dtype=accumulator_dtype(hidden.dtype))


@torch.library.custom_op("fastalign::head_table_grad", mutates_args=())
def _head_table_grad(
    grad: Tensor,
    table: Tensor,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
    workspace_mib: float | None,
    tail_eps: float | None,
    hidden_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    head = Head(
        hidden, weight, ids, bias, Transform(logit_scale, softcap, temperature), workspace_mib, tail_eps
    )
    per_token = coefficients(grad, table, weight.shape[0])
    _, gradients = sweep(
        head,
        table,
        lambda stats, index: per_token[:, index].contiguous(),
        (hidden_grad, weight_grad, bias_grad),
    )
    return gradients.hidden, gradients.weight, gradients.bias


@_head_table_grad.register_fake
def _(
    grad,
    table,
    hidden,
    weight,
    ids,
    bias,
    logit_scale,
    softcap,
    temperature,
    workspace_mib,
    tail_eps,
    hidden_grad,
    weight_grad,
    bias_grad,
):
    return fake_gradients(hidden, weight, bias, hidden_grad, weight_grad, bias_grad)


def _save_table(ctx, inputs, output) -> None:
    hidden, weight, ids, bias, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, ids, bias, output)


def _table_backward(ctx, saved: Sequence[Tensor], grad: Tensor) -> InputGrads:
    hidden, weight, ids, bias, table = saved
    needs = ctx.needs_input_grad
    gradients = _head_table_grad(
        grad, table, hidden, weight, ids, bias, *ctx.options, needs[0], needs[1], needs[3]
    )
    d_hidden, d_weight, d_bias = (
        g if need else None for g, need in zip(gradients, (needs[0], needs[1], needs[3]))
    )
    return d_hidden, d_weight, None, d_bias, *[None] * 5


_LOSSES = "linear_logprobs, linear_token_stats or linear_cross_entropy"
_head_table.register_autograd(first_order(_LOSSES, _table_backward), setup_context=_save_table)


# The same with a tail: what the backward pass needs is kept, and no logits are made again.


@torch.library.custom_op("fastalign::head_table_kept", mutates_args=())
def _head_table_kept(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
    workspace_mib: float | None,
    tail_eps: float,
    hidden_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The table [7, N] and a KeptState."""
    head = Head(
        hidden, weight, ids, bias, Transform(logit_scale, softcap, temperature), workspace_mib, tail_eps
    )
    table, state = sweep_keeping(head, (hidden_grad, weight_grad, bias_grad))
    return table, *state


@_head_table_kept.register_fake
def _(
    hidden,
    weight,
    ids,
    bias,
    logit_scale,
    softcap,
    temperature,
    workspace_mib,
    tail_eps,
    hidden_grad,
    weight_grad,
    bias_grad,
):
    head = Head(
        hidden, weight, ids, bias, Transform(logit_scale, softcap, temperature), workspace_mib, tail_eps
    )
    table = hidden.new_empty(len(Stat), hidden.shape[0], dtype=accumulator_dtype(hidden.dtype))
    return table, *empty_state(head, (hidden_grad, weight_grad, bias_grad))


@torch.library.custom_op("fastalign::head_table_kept_grad", mutates_args=())
def _head_table_kept_grad(
    grad: Tensor,
    table: Tensor,
    state: Sequence[Tensor],
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
    workspace_mib: float | None,
    tail_eps: float,
    hidden_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    head = Head(
        hidden, weight, ids, bias, Transform(logit_scale, softcap, temperature), workspace_mib, tail_eps
    )
    per_token = coefficients(grad, table, weight.shape[0])
    wanted = (hidden_grad, weight_grad, bias_grad)
    gradients = sweep_kept(
        head, table, KeptState(*state), lambda stats, index: per_token[:, index].contiguous(), wanted
    )
    return gradients.hidden, gradients.weight, gradients.bias


@_head_table_kept_grad.register_fake
def _(grad, table, state, hidden, weight, ids, bias, *options):
    return fake_gradients(hidden, weight, bias, *options[-3:])


def _save_kept(ctx, inputs, output) -> None:
    hidden, weight, ids, bias, *ctx.options = inputs
    table, *state = output
    ctx.mark_non_differentiable(*state)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, ids, bias, table, *state)


def _kept_backward(ctx, saved: Sequence[Tensor], grad: Tensor | None, *_: None) -> InputGrads:
    if grad is None:
        return (None,) * 12
    hidden, weight, ids, bias, table, *state = saved
    gradients = _head_table_kept_grad(grad, table, state, hidden, weight, ids, bias, *ctx.options)
    d_hidden, d_weight, d_bias = (g if need else None for g, need in zip(gradients, ctx.options[-3:]))
    return d_hidden, d_weight, None, d_bias, *[None] * 8


_head_table_kept.register_autograd(first_order(_LOSSES, _kept_backward), setup_context=_save_kept)


def head_table(arguments: Sequence[Any], wanted: Sequence[bool]) -> Tensor:
    """The table [7, N] of `head.prepare`'s arguments; `wanted`: gradients of hidden, weight and bias."""
    hidden, *_, tail_eps = arguments
    if tail_eps is not None and any(wanted) and not capturing(hidden):
        return _head_table_kept(*arguments, *wanted)[0]
    return _head_table(*arguments)
