"""Log-probabilities of given tokens from hidden states, for any upstream gradient.

Under a head that is not trained (LoRA runs; mode frozen_head) the gradient of a token's log-probability
factors: dX[t] = g[t] D[t], with D[t] = d logp[t] / d hidden[t] = W[y_t] - P_t W. D is computed in forward,
while the logits exist: 2 GEMMs of 2 N H V flops in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from ..autograd import NamedGrads
from ..softmax.rows import Stat, accumulator_dtype
from . import engines
from .engine import empty_gradients, empty_stats
from .head_ops import OpCall, register_head_op
from .inputs import HeadInputs, NeedsGrad, head_inputs
from .kept_stats import kept_stats
from .options import HeadArguments, head_keywords, head_options
from .token_losses import TokenCrossEntropy
from .token_stats import head_stats


def _frozen(inputs: HeadInputs, needs: NeedsGrad, origin: Tensor) -> tuple[Tensor, Tensor]:
    """The table [7, N], and D [N, H]: in hidden's dtype, or in fp32 if the options say `wide`.

    origin: an empty tensor with hidden's graph, to which the error of a second derivative is attached.
        Hidden itself is not saved, which would be [N, H] for nothing.
    """
    hidden = inputs.hidden
    # d logp = -d cross-entropy
    minus = hidden.new_full((1,), -1.0, dtype=accumulator_dtype(hidden.dtype)).expand(hidden.shape[0])
    of_logp = TokenCrossEntropy(minus, 0.0, 0.0, inputs.vocab_size)
    stats, grads = engines.statistics_and_gradients(inputs, of_logp, needs)
    return stats, grads.hidden


def _fake_frozen(inputs, needs, origin):
    return empty_stats(inputs), empty_gradients(inputs, needs).hidden


def _save(ctx, call: OpCall, output: tuple[Tensor, Tensor]) -> None:
    _, d_logp = output
    ctx.mark_non_differentiable(d_logp)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(d_logp, *call.rest)
    ctx.dtype = call.inputs.hidden.dtype


def _backward(ctx, saved: Sequence[Tensor], grad: Tensor | None, *_: None) -> NamedGrads:
    d_logp = saved[0]
    if grad is None:
        return {}
    return {"hidden": (grad[Stat.LOGP][:, None] * d_logp).to(ctx.dtype)}


_head_frozen = register_head_op(
    "head_frozen", _frozen, _fake_frozen, save=_save, backward=_backward, losses="linear_logprobs"
)


def logprobs(inputs: HeadInputs) -> Tensor:
    """`linear_logprobs` [N] of checked inputs."""
    inputs = inputs.lean()
    if inputs.mode("logp") == "frozen_head":
        origin = inputs.hidden[:0].clone()  # a view would keep all of hidden
        # On a GPU dX in fp16 would be rounded twice, as PyTorch's is not. An fp32 D takes 2 N H bytes more.
        fp16 = inputs.hidden.is_cuda and inputs.hidden.dtype == torch.float16
        if fp16 and inputs.options.tail_eps is None:
            inputs = inputs._replace(options=inputs.options._replace(wide=True))
        stats, _ = _head_frozen(inputs, inputs.needs_grad(), origin)
    else:
        stats = head_stats(inputs)
    return stats[Stat.LOGP]


@head_keywords
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None = None,
    *,
    kept: tuple[Tensor, Tensor] | None = None,
    **head: Unpack[HeadArguments],
) -> Tensor:
    """Log-probability of each id under softmax(hidden @ weight.T + bias), without the logits in memory.

    Supports any upstream gradient. Costs 1 GEMM without gradients, 2 with a frozen weight (LoRA runs), 4 when
    training. On a GPU it costs 3 for tokens whose softmax fits in the workspace.

    Args:
        hidden, weight, ids, bias: [..., H], [V, H], [...], [V], as in `linear_cross_entropy`.
        kept: (offsets [N + 1], kept_ids [M]), integers: the softmax of token n is over the different
            kept_ids[offsets[n] : offsets[n + 1]] alone (kept_stats.py). An id outside its set has logp -inf
            and no gradient; check=True refuses it. tail_eps is refused.
        **head: `HeadArguments` documents these keywords.

    Returns:
        [...] in nats, fp32 (fp64 for fp64 inputs). Ignored positions are 0 and get no gradient.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range.
    """
    inputs = head_inputs(hidden, weight, ids, bias, head_options(linear_logprobs, head))
    return (logprobs(inputs) if kept is None else kept_stats(inputs, kept).logp).view(ids.shape)
