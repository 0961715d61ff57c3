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

from .. import checks
from ..autograd import NamedGrads, register_op
from ..logits import TokenStats, kept_ids, stats_of
from ..softmax.rows import Transform, coefficients, row_stats_ref, traced
from ..torch_func import transforming
from . import engines
from .engine import empty_gradients, empty_stats
from .inputs import HeadInputs, NeedsGrad, head_inputs, head_options


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


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int | None = -100,
    entropy: bool = True,
    tail_eps: float | None = None,
    workspace_mib: float | None = None,
    check: bool = False,
) -> TokenStats:
    """Log-probability, entropy and logsumexp of each position, differentiable, and top-1.

    Costs 1 GEMM without gradients, 3 with a frozen weight, 4 when training; on a GPU 2 and 3 for tokens whose
    softmax the workspace holds. Arguments and errors as in
    `linear_cross_entropy`.

    Args:
        entropy: False leaves that field None.
    Returns:
        [...] each: logp, entropy, lse in nats, fp32 (fp64 for fp64 inputs); top1 bool. Ignored positions are
        0 / False and get no gradient.
    """
    checks.flags(entropy=entropy)
    options = head_options(
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        tail_eps=tail_eps,
        workspace_mib=workspace_mib,
    )
    inputs = head_inputs(hidden, weight, ids, bias, options, ignore_index=ignore_index, check=check)
    return stats_of(head_stats(inputs if entropy else inputs.lean()), ids.shape, entropy)


def logits_ref(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Raw logits [1, N, V] in full: plain PyTorch, for the specifications."""
    logits = hidden @ weight.to(hidden.dtype).t()
    return (logits if bias is None else logits + bias.to(logits.dtype)).reshape(1, -1, weight.shape[0])


def linear_token_stats_ref(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int | None = -100,
    entropy: bool = True,
) -> TokenStats:
    """The specification of `linear_token_stats`, and by its first field of `linear_logprobs`."""
    transform = Transform(logit_scale, softcap or 0.0, temperature)
    stats = row_stats_ref(logits_ref(hidden, weight, bias), kept_ids(ids, ignore_index), None, transform)
    return stats_of(stats, ids.shape, entropy)
