"""Statistics of a head's tokens, for any upstream gradient: the modes no_grad and general.

    hidden [N, H], weight [V, H], ids [N]  ->  the table of softmax/rows.py, [7, N]

The gradient is computed in backward, from what the engine saved or from recomputed logits: 2 + dX + dW GEMMs
of 2 N H V flops on a CPU, and 1 + dX + dW on a GPU for tokens whose softmax the workspace holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Unpack

from torch import Tensor

from .. import checks
from ..autograd import NamedGrads
from ..logits import TokenStats, stats_of
from ..softmax.rows import coefficients
from ..torch_func import traced, transforming
from . import engines
from .engine import Gradients, empty_stats
from .head_ops import OpCall, head_grads, register_head_grads, register_head_op, save_call, saved_call
from .inputs import HeadInputs, NeedsGrad, head_inputs
from .options import HeadArguments, head_keywords, head_options


def _stats(inputs: HeadInputs, needs: NeedsGrad) -> Tensor:
    """The table [7, N]; needs are those of the backward pass."""
    return engines.statistics(inputs, NeedsGrad())[0]


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


_head_stats_grad = register_head_grads("head_stats_grad", _stats_grad)
_head_stats_grad_once = register_head_grads("head_stats_grad_once", _stats_grad, overwrites=["saved"])


def _save(ctx, call: OpCall, output: Tensor | tuple[Tensor, list[Tensor]]) -> None:
    stats, saved = output if isinstance(output, tuple) else (output, [])
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    # Autograd refuses saved tensors that were overwritten, so an overwriting engine's are held here.
    ctx.once = engines.overwrites_saved(call.inputs, call.needs)
    ctx.overwritten = saved if ctx.once else []
    save_call(ctx, call, stats, *([] if ctx.once else saved))


def _backward(ctx, tensors: Sequence[Tensor], grad: Tensor | None, *_: object) -> NamedGrads:
    if grad is None:
        return {}
    (inputs, needs, _), (stats, *saved) = saved_call(ctx, tensors)
    if not ctx.once:
        return head_grads(_head_stats_grad(inputs, needs, grad, stats, saved), needs)
    saved = ctx.overwritten
    if not traced(grad):  # a second backward recomputes the logits; traced code copies what it overwrites
        ctx.overwritten = []
    return head_grads(_head_stats_grad_once(inputs, needs, grad, stats, saved), needs)


_LOSSES = "linear_logprobs, linear_token_stats or linear_cross_entropy"
_register = partial(register_head_op, save=_save, backward=_backward, losses=_LOSSES)
_head_stats = _register("head_stats", _stats, empty_stats)
_head_stats_saving = _register("head_stats_saving", _stats_and_saved, _fake_stats_and_saved)


def head_stats(inputs: HeadInputs) -> Tensor:
    """The statistics [7, N] of a call, differentiable."""
    needs = inputs.needs_grad()
    # torch.func.vmap serves no op that returns a list of tensors; without one the logits are recomputed.
    if transforming() or not engines.engine_for(inputs, needs).saves(inputs, needs):
        return _head_stats(inputs, needs)
    return _head_stats_saving(inputs, needs)[0]


@head_keywords
def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None = None,
    *,
    entropy: bool = True,
    **head: Unpack[HeadArguments],
) -> TokenStats:
    """Log-probability, entropy and logsumexp of each position, differentiable, and top-1.

    Costs 1 GEMM without gradients, 3 with a frozen weight, 4 when training; 1 less where a GPU keeps P.

    Args:
        hidden, weight, ids, bias: [..., H], [V, H], [...], [V], as in `linear_cross_entropy`.
        entropy: False leaves that field None.
        **head: `HeadArguments` documents these keywords.

    Returns:
        [...] each: logp, entropy, lse in nats, fp32 (fp64 for fp64 inputs); top1 bool. Ignored positions are
        0 / False and get no gradient.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range.
    """
    checks.flags(entropy=entropy)
    inputs = head_inputs(hidden, weight, ids, bias, head_options(linear_token_stats, head))
    return stats_of(head_stats(inputs if entropy else inputs.lean()), ids.shape, entropy)
