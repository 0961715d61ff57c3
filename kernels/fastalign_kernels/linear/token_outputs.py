"""Per-token outputs that trainers log beside the log-probability, from hidden states.

With z the logits of the softmax and P their softmax, in nats:

    mean_logit = mean_v z            log_sum_sq_probs = log sum_v P^2 = lse(2 z) - 2 lse(z)
"""

from __future__ import annotations

from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from .. import checks
from ..softmax.rows import Stat, accumulator_dtype
from ..torch_func import without_autocast
from .inputs import HeadInputs, head_inputs
from .logprobs import logprobs
from .options import HeadArguments, head_keywords, head_options
from .sharded import Shards
from .sharded_collectives import sum_of_ranks
from .token_stats import head_stats


class TokenOutputs(NamedTuple):
    """Outputs of each token, [...], fp32 (fp64 for fp64 inputs) and top1 bool; None if not asked for."""

    logp: Tensor
    entropy: Tensor | None
    log_sum_sq_probs: Tensor | None
    mean_logit: Tensor | None
    top1: Tensor | None


@head_keywords
def linear_token_outputs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None = None,
    *,
    entropy: bool = False,
    log_sum_sq_probs: bool = False,
    mean_logit: bool = False,
    top1: bool = False,
    **head: Unpack[HeadArguments],
) -> TokenOutputs:
    """Log-probability of each id, and the outputs asked for. Only logp and entropy are differentiable.

    Costs what `linear_token_stats` does, and what `linear_logprobs` does if no entropy and no top1 is asked
    for. log_sum_sq_probs costs one more GEMM, mean_logit one read of the weight.

    Args:
        hidden, weight, ids, bias: [..., H], [V, H], [...], [V], as in `linear_cross_entropy`.
        entropy, log_sum_sq_probs, mean_logit, top1: which outputs to compute.
        **head: `HeadArguments` documents these keywords.

    Returns:
        Ignored positions are 0 / False and get no gradient.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range.
    """
    checks.flags(entropy=entropy, log_sum_sq_probs=log_sum_sq_probs, mean_logit=mean_logit, top1=top1)
    inputs = head_inputs(hidden, weight, ids, bias, head_options(linear_token_outputs, head))
    capped = mean_logit and inputs.options.softcap > 0
    if not (entropy or log_sum_sq_probs or top1 or capped):
        logp, table = logprobs(inputs), None
    else:
        table = head_stats(inputs if entropy or capped else inputs.lean())
        logp = table[Stat.LOGP]
    shape = ids.shape
    return TokenOutputs(
        logp.view(shape),
        table[Stat.ENTROPY].view(shape) if entropy and table is not None else None,
        _log_sum_sq_probs(inputs, table).view(shape) if log_sum_sq_probs and table is not None else None,
        _mean_logit(inputs, table if capped else None).view(shape) if mean_logit else None,
        (table[Stat.TOP1] > 0).view(shape) if top1 and table is not None else None,
    )


@torch.no_grad()
def _log_sum_sq_probs(inputs: HeadInputs, table: Tensor) -> Tensor:
    """lse(2 z) - 2 lse(z), [N]: half the temperature doubles the logits."""
    options = inputs.options
    doubled = inputs._replace(options=options._replace(temperature=options.temperature / 2)).lean()
    return head_stats(doubled)[Stat.LSE] - 2 * table[Stat.LSE]


@torch.no_grad()
def _mean_logit(inputs: HeadInputs, table: Tensor | None) -> Tensor:
    """mean_v z, [N], by the linearity of the head; under a softcap from the table [7, N].

    MEAN_LOGP + LSE is off by two roundings of lse, which a small mean_logit notices.
    """
    if table is not None:
        return table[Stat.MEAN_LOGP] + table[Stat.LSE]
    hidden, weight, bias, options = inputs.hidden, inputs.weight, inputs.bias, inputs.options
    dtype = accumulator_dtype(hidden.dtype)
    shards = options.shards
    with without_autocast(hidden):
        if shards is not None:
            return _sharded_mean_logit(inputs, shards)
        mean = hidden.to(dtype) @ weight.mean(0, dtype=dtype)
        if inputs.lora is not None:
            mean = mean + inputs.lora.hidden.to(dtype) @ inputs.lora.weight.mean(0, dtype=dtype)
    if bias is not None:
        mean = mean + bias.mean(dtype=dtype)
    return torch.where(inputs.ids < 0, 0.0, mean * (options.logit_scale / options.temperature))


def _sharded_mean_logit(inputs: HeadInputs, shards: Shards) -> Tensor:
    """The mean logit of each token under a sharded head without a softcap; one all-reduce sums the ranks'."""
    options, wide = inputs.options, torch.float64
    total = inputs.hidden.to(wide) @ inputs.weight.sum(0, dtype=wide)
    if inputs.lora is not None:
        total = total + inputs.lora.hidden.to(wide) @ inputs.lora.weight.sum(0, dtype=wide)
    if inputs.bias is not None:
        total = total + inputs.bias.sum(dtype=wide)
    mean = sum_of_ranks(total, len(shards.rows), inputs.group) / shards.vocab_size
    mean = torch.where(inputs.ids < 0, 0.0, mean * (options.logit_scale / options.temperature))
    return mean.to(accumulator_dtype(inputs.hidden.dtype))
