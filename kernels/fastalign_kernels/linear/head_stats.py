"""Statistics of a head's tokens, for any upstream gradient: the modes no_grad and general.

    hidden [N, H], weight [V, H], ids [N]  ->  the table of softmax/rows.py, [7, N]

The gradient is computed in backward, when the upstream gradients of logp, entropy and lse are known. It uses
what the engine saved, or recomputes the logits: 2 + dX + dW GEMMs of 2 N H V flops on a CPU. On a GPU the
softmax of as many tokens as the workspace holds is kept, for which it is 1 + dX + dW.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..autograd import NamedGrads, register_op
from ..softmax.rows import coefficients
from ..torch_func import traced, transforming
from . import engines
from .engine import empty_gradients, empty_stats
from .inputs import HeadInputs, NeedsGrad


def _stats(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    options: list[float],
    needs: list[bool],
) -> Tensor:
    """The table [7, N]."""
    inputs = HeadInputs.of(hidden, weight, ids, bias, options)
    return engines.statistics(inputs, NeedsGrad())[0]


def _fake_stats(hidden, weight, ids, bias, options, needs):
    return empty_stats(HeadInputs.of(hidden, weight, ids, bias, options))


def _stats_and_saved(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    options: list[float],
    needs: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    """The table [7, N], and what the engine saves for `_stats_grad`."""
    inputs = HeadInputs.of(hidden, weight, ids, bias, options)
    return engines.statistics(inputs, NeedsGrad(*needs))


def _fake_stats_and_saved(hidden, weight, ids, bias, options, needs):
    inputs = HeadInputs.of(hidden, weight, ids, bias, options)
    needs_grad = NeedsGrad(*needs)
    return empty_stats(inputs), engines.engine_for(inputs, needs_grad).empty_saved(inputs, needs_grad)


def _stats_grad(
    grad: Tensor,
    stats: Tensor,
    saved: Sequence[Tensor],
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    options: list[float],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, weight and bias for the table's upstream gradient [7, N]."""
    inputs = HeadInputs.of(hidden, weight, ids, bias, options)
    of_tokens = coefficients(grad, stats, inputs.vocab_size)
    return engines.gradients(inputs, stats, list(saved), of_tokens, NeedsGrad(*needs))


def _fake_stats_grad(grad, stats, saved, hidden, weight, ids, bias, options, needs):
    return empty_gradients(HeadInputs.of(hidden, weight, ids, bias, options), NeedsGrad(*needs))


_head_stats_grad = torch.library.custom_op("fastalign::head_stats_grad", _stats_grad, mutates_args=())
_head_stats_grad.register_fake(_fake_stats_grad)
# The same of an engine that overwrites what it saved.
_head_stats_grad_once = torch.library.custom_op(
    "fastalign::head_stats_grad_once", _stats_grad, mutates_args=("saved",)
)
_head_stats_grad_once.register_fake(_fake_stats_grad)


def _save(ctx, inputs, output) -> None:
    hidden, weight, ids, bias, ctx.options, ctx.needs = inputs
    stats, saved = output if isinstance(output, tuple) else (output, [])
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    # Autograd refuses saved tensors that were overwritten, so such an engine's are held here.
    call = HeadInputs.of(hidden, weight, ids, bias, ctx.options)
    ctx.once = engines.overwrites_saved(call, NeedsGrad(*ctx.needs))
    ctx.overwritten = saved if ctx.once else []
    ctx.save_for_backward(hidden, weight, ids, bias, stats, *([] if ctx.once else saved))


def _backward(ctx, tensors: Sequence[Tensor], grad: Tensor | None, *_: object) -> NamedGrads:
    if grad is None:
        return {}
    hidden, weight, ids, bias, stats, *saved = tensors
    op = _head_stats_grad
    if ctx.once:
        op, saved = _head_stats_grad_once, ctx.overwritten
        if not traced(grad):  # a second backward recomputes the logits; traced code copies what it overwrites
            ctx.overwritten = []
    grads = op(grad, stats, saved, hidden, weight, ids, bias, ctx.options, ctx.needs)
    return {name: value for name, value, need in zip(("hidden", "weight", "bias"), grads, ctx.needs) if need}


_LOSSES = "linear_logprobs, linear_token_stats or linear_cross_entropy"
_head_stats = register_op("head_stats", _stats, _fake_stats, save=_save, backward=_backward, losses=_LOSSES)
_head_stats_saving = register_op(
    "head_stats_saving",
    _stats_and_saved,
    _fake_stats_and_saved,
    save=_save,
    backward=_backward,
    losses=_LOSSES,
)


def head_stats(inputs: HeadInputs) -> Tensor:
    """The statistics [7, N] of a call, differentiable."""
    needs = inputs.needs_grad()
    arguments = (*inputs.tensors, inputs.options.numbers(), list(needs))
    # torch.func.vmap serves no op that returns a list of tensors; without one the logits are recomputed.
    if transforming() or not engines.engine_for(inputs, needs).saves(inputs, needs):
        return _head_stats(*arguments)
    return _head_stats_saving(*arguments)[0]
