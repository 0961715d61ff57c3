"""Cross-entropy from hidden states, without the logits in memory.

    hidden [N, H], weight [V, H], targets [N]  ->  loss, and the statistics table [7, N] of softmax/rows.py

The upstream gradient of a reduced loss is a scalar. The gradients are therefore computed in forward, while
the logits exist, and backward scales them: 1 + dX + dW GEMMs of 2 N H V flops, where plain PyTorch takes 3
and holds several [N, V]. dX and dW are summed in fp32 from low-precision factors: rounding each chunk's share
of dW to bf16 would bias training. Without a reduction the loss is a function of `head_stats`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..autograd import register_loss_op
from ..logits import check_loss_tensors, kept_ids, loss_options, loss_scale, reduced, token_loss
from ..ordered_sum import ordered_sum
from ..softmax.rows import Stat, Transform, accumulator_dtype, row_stats_ref
from . import engines
from .engine import empty_gradients, empty_stats
from .inputs import HeadInputs, NeedsGrad, check_tail_smoothing, head_inputs, head_options
from .token_losses import TokenCrossEntropy
from .token_stats import head_stats, logits_ref


class CrossEntropyStats(NamedTuple):
    """loss (differentiable); per token and without gradient: logp, entropy, lse in nats, top1 bool."""

    loss: Tensor
    logp: Tensor
    entropy: Tensor
    lse: Tensor
    top1: Tensor


def _loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    options: list[float],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The sum over tokens of scale [N] times cross-entropy, the table [7, N], and gradients.

    options: label_smoothing, z_loss, and those of the head.
    """
    label_smoothing, z_loss, *numbers = options
    inputs = HeadInputs.of(hidden, weight, ids, bias, numbers)

    of_tokens = TokenCrossEntropy(scale, label_smoothing, z_loss, inputs.vocab_size)
    stats, grads = engines.statistics_and_gradients(inputs, of_tokens, NeedsGrad(*needs))
    d_scale = token_loss(stats, label_smoothing, z_loss)
    return ordered_sum(d_scale * scale), stats, *grads, d_scale


def _fake_loss(hidden, weight, ids, bias, scale, options, needs):
    inputs = HeadInputs.of(hidden, weight, ids, bias, options[2:])
    stats = empty_stats(inputs)
    grads = empty_gradients(inputs, NeedsGrad(*needs))
    return stats.new_empty(()), stats, *grads, torch.empty_like(scale)


_head_loss = register_loss_op(
    "head_loss",
    _loss,
    _fake_loss,
    differentiable=("hidden", "weight", "bias", "scale"),
    losses="linear_cross_entropy",
)


def _cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    *,
    ignore_index: int | None,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    reduction: str,
    token_weights: Tensor | None,
    num_items: float | Tensor | None,
    tail_eps: float | None,
    workspace_mib: float | None,
    check: bool,
    needs_entropy: bool,
) -> CrossEntropyStats:
    """`linear_cross_entropy_stats`; without needs_entropy an engine may leave the entropy 0."""
    label_smoothing, z_loss = loss_options(reduction, label_smoothing, z_loss)
    check_tail_smoothing(tail_eps, label_smoothing, softcap)
    check_loss_tensors(targets, reduction, token_weights, num_items)
    options = head_options(
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        tail_eps=tail_eps,
        workspace_mib=workspace_mib,
    )
    inputs = head_inputs(
        hidden,
        weight,
        targets,
        bias,
        options,
        ignore_index=ignore_index,
        check=check,
        ids_name="targets",
    )
    if not needs_entropy and not label_smoothing:
        inputs = inputs.lean()
    dtype = accumulator_dtype(inputs.hidden.dtype)
    scale = loss_scale(inputs.ids >= 0, reduction, token_weights, num_items, dtype)
    if reduction == "none" or inputs.mode("scalar") == "general":
        stats = head_stats(inputs)
        loss = reduced(token_loss(stats, label_smoothing, z_loss), scale, reduction, targets.shape)
    else:
        numbers = [label_smoothing, z_loss, *inputs.options.numbers()]
        total, stats, *_ = _head_loss(*inputs.tensors, scale, numbers, list(inputs.needs_grad()))
        loss = total / 0.0 if reduction == "mean" and targets.numel() == 0 else total
    stats = stats.detach().view(len(Stat), *targets.shape)
    return CrossEntropyStats(
        loss, stats[Stat.LOGP], stats[Stat.ENTROPY], stats[Stat.LSE], stats[Stat.TOP1] > 0
    )


def linear_cross_entropy_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    num_items: float | Tensor | None = None,
    tail_eps: float | None = None,
    workspace_mib: float | None = None,
    check: bool = False,
) -> CrossEntropyStats:
    """`linear_cross_entropy`, and the statistics of its tokens from the same pass.

    Returns:
        The loss, and [...] each without gradient: logp, entropy, lse, top1; 0 / False where ignored.
    """
    return _cross_entropy(
        hidden,
        weight,
        targets,
        bias,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        reduction=reduction,
        token_weights=token_weights,
        num_items=num_items,
        tail_eps=tail_eps,
        workspace_mib=workspace_mib,
        check=check,
        needs_entropy=True,
    )


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    num_items: float | Tensor | None = None,
    tail_eps: float | None = None,
    workspace_mib: float | None = None,
    check: bool = False,
) -> Tensor:
    """Cross-entropy of targets under softmax(hidden @ weight.T + bias), in nats, without the logits.

    z = hidden @ weight.T + bias, then z * logit_scale, then softcap * tanh(z / softcap), then
    z / temperature. A token's loss is -(1 - e) log P[target] - e mean_v log P[v] + z_loss * lse^2, with e =
    label_smoothing.

    Args:
        hidden: [..., H], fp32, bf16 or fp16 (fp64 on a CPU). Under autocast it is cast to the autocast dtype.
        weight: [V, H], of hidden's dtype, or fp32 master weights beside bf16 or fp16 hidden states. Master
            weights are cast for the GEMMs, and their gradient is fp32, never rounded.
        targets: [...] int64 or int32 in [0, V), or ignore_index. Ignored tokens enter no GEMM.
        bias: [V], of the weight's dtypes.
        ignore_index: None is -100, as in torch's linear_cross_entropy.
        reduction: "mean" over tokens that are not ignored (over their token_weights, or divided by
            num_items), "sum", or "none".
        token_weights: [...] float; multiplies each token's loss. Differentiable.
        num_items: divisor of "mean", for accumulation over micro-batches and ranks.
        tail_eps: None for exact gradients. Otherwise a block of tokens (256 on a CPU) takes only the columns
            of the softmax where some token's probability exceeds tail_eps into its backward GEMMs. A rank-1
            matrix with the same row and column sums stands for the rest (tail_columns.py). The loss and the
            statistics stay exact. On a trained model gradients are off by 0.1 to 0.2 % at 2**-14 and by 0.4
            to 0.6 % at 2**-12 (`tail_report` measures it). 3 GEMMs become 1 + 2 f, f the share of columns
            kept. Where f > 0.6, as in an untrained model, a block runs exact.
        workspace_mib: MiB for logits and what is made of them beside the gradients. Default on a GPU: a
            sixteenth of its memory, at most 2560; less makes the call slower (docs/head.md). On a CPU 96, or
            72 beside a gradient of the weight. On a CPU whose products are torch's, low-precision weights
            are widened once besides (4 V H bytes).
        check: on CUDA, also check the range of targets, which waits for the device. FASTALIGN_CHECK=1 does so
            everywhere.

    Returns:
        A scalar, or [...] with reduction="none": fp32, fp64 for fp64. NaN where there is nothing to average,
        as in torch.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range, or is no option's name.
    """
    return _cross_entropy(
        hidden,
        weight,
        targets,
        bias,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        reduction=reduction,
        token_weights=token_weights,
        num_items=num_items,
        tail_eps=tail_eps,
        workspace_mib=workspace_mib,
        check=check,
        needs_entropy=False,
    ).loss


def linear_cross_entropy_ref(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    num_items: float | Tensor | None = None,
) -> Tensor:
    """The specification of `linear_cross_entropy`: plain PyTorch with full logits."""
    ids = kept_ids(targets, ignore_index)
    table = row_stats_ref(
        logits_ref(hidden, weight, bias), ids, None, Transform(logit_scale, softcap or 0.0, temperature)
    )
    scale = loss_scale(ids >= 0, reduction, token_weights, num_items, table.dtype)
    return reduced(token_loss(table, label_smoothing, z_loss), scale, reduction, targets.shape)
