"""Statistics of a head's tokens, for any upstream gradient: the modes no_grad and general.

    hidden [N, H], weight [V, H], ids [N]  ->  the table of softmax/rows.py, [7, N]

The gradient is computed in backward, when the upstream gradients of logp, entropy and lse are known. It uses
what the engine saved, or recomputes the logits: 2 + dX + dW GEMMs of 2 N H V flops on a CPU. On a GPU the
softmax of as many tokens as the workspace holds is kept, for which it is 1 + dX + dW.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..autograd import NamedGrads
from ..softmax.rows import coefficients
from ..torch_func import traced, transforming
from . import engines
from .engine import Gradients, empty_gradients, empty_stats
from .head_ops import OpCall, head_grads, register_head_grads, register_head_op, save_call, saved_call
from .inputs import HeadInputs, NeedsGrad


def _stats(inputs: HeadInputs, needs: NeedsGrad) -> Tensor:
    """The table [7, N]; needs are those of the backward pass."""
    return engines.statistics(inputs, NeedsGrad())[0]


def _fake_stats(inputs, needs):
    return empty_stats(inputs)


def _stats_and_saved(inputs: HeadInputs, needs: NeedsGrad) -> tuple[Tensor, list[Tensor]]:
    """The table [7, N], and what the engine saves for `_stats_grad`."""
    return engines.statistics(inputs, needs)


def _fake_stats_and_saved(inputs, needs):
    return empty_stats(inputs), engines.engine_for(inputs, needs).empty_saved(inputs, needs)


def _stats_grad(
    inputs: HeadInputs, needs: NeedsGrad, grad: Tensor, stats: Tensor, saved: Sequence[Tensor]
) -> Gradients:
    """Gradients for the table's upstream gradient [7, N]."""
    of_tokens = coefficients(grad, stats, inputs.vocab_size)
    return engines.gradients(inputs, stats, list(saved), of_tokens, needs)


def _fake_stats_grad(inputs, needs, *_):
    return empty_gradients(inputs, needs)


_head_stats_grad = register_head_grads("head_stats_grad", _stats_grad, _fake_stats_grad)
# The same of an engine that overwrites what it saved.
_head_stats_grad_once = register_head_grads(
    "head_stats_grad_once", _stats_grad, _fake_stats_grad, overwrites=["saved"]
)


def _save(ctx, call: OpCall, output: Tensor | tuple[Tensor, list[Tensor]]) -> None:
    stats, saved = output if isinstance(output, tuple) else (output, [])
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    # Autograd refuses saved tensors that were overwritten, so such an engine's are held here.
    ctx.once = engines.overwrites_saved(call.inputs, call.needs)
    ctx.overwritten = saved if ctx.once else []
    save_call(ctx, call, stats, *([] if ctx.once else saved))


def _backward(ctx, tensors: Sequence[Tensor], grad: Tensor | None, *_: object) -> NamedGrads:
    if grad is None:
        return {}
    (inputs, needs, _), (stats, *saved) = saved_call(ctx, tensors)
    op = _head_stats_grad
    if ctx.once:
        op, saved = _head_stats_grad_once, ctx.overwritten
        if not traced(grad):  # a second backward recomputes the logits; traced code copies what it overwrites
            ctx.overwritten = []
    return head_grads(op(inputs, needs, grad, stats, saved), needs)


_LOSSES = "linear_logprobs, linear_token_stats or linear_cross_entropy"
_head_stats = register_head_op(
    "head_stats", _stats, _fake_stats, save=_save, backward=_backward, losses=_LOSSES
)
_head_stats_saving = register_head_op(
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
    # torch.func.vmap serves no op that returns a list of tensors; without one the logits are recomputed.
    if transforming() or not engines.engine_for(inputs, needs).saves(inputs, needs):
        return _head_stats(inputs, needs)
    return _head_stats_saving(inputs, needs)[0]
