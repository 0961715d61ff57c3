"""The language-model head without logits: from hidden states and the head's weight to log-probabilities,
statistics and losses.

    hidden [N, H], weight [V, H], ids [N]  ->  the statistics table of softmax/rows.py, [7, N]; [N, V] logits never exist.

One loop over chunks of C tokens (linear/token_tiles.py) serves four ways. GEMM: one N x H x V matrix product, 2 N H V
flops; the naive loss takes 3.

    way                  GEMMs            kept for backward
    no_grad              1                nothing
    gradient_in_forward  1 + dX + dW      dX, dW      the upstream gradient is a scalar, so it can be applied afterwards
    general              2 + dX + dW      the table   any upstream gradient of logp, entropy, lse; logits are computed twice
    frozen_head          2                D [N, H]    dX[t] = g[t] D[t] with D = d logp / d hidden, when only logp is asked for

Between the GEMMs: one read of the logits tile (statistics), one read and one write (gradient). Ignored tokens
enter no GEMM. dX and dW are summed in fp32 from low-precision inputs; rounding each chunk's share of dW to
bf16 would bias training (trl/kernels says the same).

Predicted, not measured, for bf16 at N 8192, H 4096, V 151936 on an H100 (700 TFLOP/s reached, 3.35 TB/s):
three GEMMs 43.7 ms (42 were measured for the bare ones, huggingface/trl#7244); between them fp32 logits are
read twice and bf16 gradients written once, 12.4 GB or 3.7 ms; so 47 ms in 14 chunks of 586 tokens, where
plain PyTorch took 59 and Liger 192.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..autograd import InputGrads, first_order, saved_inputs, scale_saved_grads
from ..logits import (
    TokenStats,
    check_loss_tensors,
    kept_ids,
    loss_options,
    loss_scale,
    make_transform,
    reduced,
    stats_of,
    token_loss,
)
from ..ordered_sum import ordered_sum
from ..softmax.rows import Stat, Transform, accumulator_dtype, coefficients, row_stats_ref
from ..torch_func import requires_grad
from .accumulate import fake_gradients
from .plan import choose_way
from .token_stats import head_table
from .token_tiles import Head, sweep


class CrossEntropyStats(NamedTuple):
    """loss (differentiable); per token and without gradient: logp, entropy, lse in nats, top1 bool."""

    loss: Tensor
    logp: Tensor
    entropy: Tensor
    lse: Tensor
    top1: Tensor


# A loss whose upstream gradient is a scalar: the way gradient_in_forward.


@torch.library.custom_op("fastalign::head_loss", mutates_args=())
def _head_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    softcap: float,
    temperature: float,
    workspace_mib: float | None,
    tail_eps: float | None,
    hidden_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """sum over tokens of scale [N] times cross-entropy, the table [7, N], and the gradients of hidden, weight
    and bias."""
    head = Head(
        hidden, weight, ids, bias, Transform(logit_scale, softcap, temperature), workspace_mib, tail_eps
    )

    # d/dz of -(1 - e) logp - e mean_logp + z_loss lse^2, times the token's scale.
    def chunk_coefficients(stats: Tensor, index: Tensor | slice) -> Tensor:
        s = scale[index]
        grad = torch.zeros_like(stats)
        grad[Stat.LOGP] = (label_smoothing - 1) * s
        grad[Stat.MEAN_LOGP] = -label_smoothing * s
        grad[Stat.LSE] = 2 * z_loss * stats[Stat.LSE] * s
        return coefficients(grad, stats, weight.shape[0])

    wanted = (hidden_grad, weight_grad, bias_grad)
    table, gradients = sweep(head, None, chunk_coefficients if any(wanted) else None, wanted)
    loss = ordered_sum(token_loss(table, label_smoothing, z_loss) * scale)
    return loss, table, *gradients


@_head_loss.register_fake
def _(
    hidden,
    weight,
    ids,
    bias,
    scale,
    label_smoothing,
    z_loss,
    logit_scale,
    softcap,
    temperature,
    workspace_mib,
    tail_eps,
    hidden_grad,
    weight_grad,
    bias_grad,
):
    table = hidden.new_empty(len(Stat), hidden.shape[0], dtype=accumulator_dtype(hidden.dtype))
    return (
        table.new_empty(()),
        table,
        *fake_gradients(hidden, weight, bias, hidden_grad, weight_grad, bias_grad),
    )


def _save_loss(ctx, inputs, output) -> None:
    hidden, weight, ids, bias, scale, *ctx.options = inputs
    _, table, *gradients = output
    ctx.mark_non_differentiable(table, *gradients)
    ctx.set_materialize_grads(
        False
    )  # else autograd allocates a [V, H] of zeros as the gradient of the output d_weight
    ctx.save_for_backward(hidden, weight, ids, bias, scale, table)
    ctx.grads = gradients


def _wanted(ctx, gradients: Sequence[Tensor]) -> list[Tensor | None]:
    """Of the gradients of hidden, weight and bias (inputs 0, 1 and 3) those that are asked for."""
    return [g if ctx.needs_input_grad[i] else None for g, i in zip(gradients, (0, 1, 3))]


def scalar_loss_backward(losses: str, op: Callable[..., Sequence[Tensor]]) -> Callable[..., InputGrads]:
    """The backward of an op of these losses saved by `save_loss` whose gradients are those of hidden,
    weight and bias."""

    def backward(ctx, saved: Sequence[Tensor], grad: Tensor | None, *_: Tensor) -> InputGrads:
        inputs = saved_inputs(ctx, saved)
        nothing = (None,) * len(inputs)
        if grad is None:
            return nothing
        d_hidden, d_weight, d_bias = _wanted(ctx, scale_saved_grads(ctx, grad, lambda: op(*inputs)[2:]))
        return d_hidden, d_weight, None, d_bias, *nothing[4:]

    return first_order(losses, backward)


def _loss_backward(ctx, saved: Sequence[Tensor], grad: Tensor | None, *_: None) -> InputGrads:
    hidden, weight, ids, bias, scale, table = saved
    nothing = (None,) * 15
    if grad is None:
        return nothing
    gradients = scale_saved_grads(
        ctx, grad, lambda: _head_loss(hidden, weight, ids, bias, scale, *ctx.options)[2:]
    )
    d_hidden, d_weight, d_bias = _wanted(ctx, gradients)
    label_smoothing, z_loss = ctx.options[:2]
    d_scale = grad * token_loss(table, label_smoothing, z_loss) if ctx.needs_input_grad[4] else None
    return d_hidden, d_weight, None, d_bias, d_scale, *nothing[5:]


_head_loss.register_autograd(first_order("linear_cross_entropy", _loss_backward), setup_context=_save_loss)


# Log-probabilities under a head that is not trained: the way frozen_head.


@torch.library.custom_op("fastalign::head_frozen", mutates_args=())
def _head_frozen(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
    workspace_mib: float | None,
    tail_eps: float | None,
    origin: Tensor,
) -> tuple[Tensor, Tensor]:
    """The table [7, N] and D [N, H] = d logp / d hidden, in hidden's dtype.

    origin: an empty tensor with hidden's graph, for the error of a second derivative. Hidden itself is not
    kept: [N, H] for nothing.
    """
    head = Head(
        hidden, weight, ids, bias, Transform(logit_scale, softcap, temperature), workspace_mib, tail_eps
    )

    def chunk_coefficients(stats: Tensor, index: Tensor | slice) -> Tensor:
        grad = torch.zeros_like(stats)
        grad[Stat.LOGP] = 1
        return coefficients(grad, stats, weight.shape[0])

    table, gradients = sweep(head, None, chunk_coefficients, (True, False, False))
    return table, gradients.hidden


@_head_frozen.register_fake
def _(hidden, weight, ids, bias, logit_scale, softcap, temperature, workspace_mib, tail_eps, origin):
    table = hidden.new_empty(len(Stat), hidden.shape[0], dtype=accumulator_dtype(hidden.dtype))
    return table, torch.empty_like(hidden, memory_format=torch.contiguous_format)


def _save_frozen(ctx, inputs, output) -> None:
    _, d_hidden = output
    ctx.mark_non_differentiable(d_hidden)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(d_hidden, inputs[-1])


def _frozen_backward(ctx, saved: Sequence[Tensor], grad: Tensor | None, *_: None) -> InputGrads:
    d_hidden = saved[0]
    return (None if grad is None else (grad[Stat.LOGP][:, None] * d_hidden).to(d_hidden.dtype), *(None,) * 9)


_head_frozen.register_autograd(first_order("linear_logprobs", _frozen_backward), setup_context=_save_frozen)


class HeadOptions(NamedTuple):
    """The options that every head function shares, checked."""

    transform: Transform
    ignore_index: int
    tail_eps: float | None
    workspace_mib: float | None


def head_options(
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ignore_index: int | None,
    tail_eps: float | None,
    workspace_mib: float | None,
) -> HeadOptions:
    return HeadOptions(
        make_transform(logit_scale, softcap, temperature),
        checks.ignore_index(ignore_index),
        None if tail_eps is None else checks.tail_eps(tail_eps),
        None if workspace_mib is None else checks.above_zero("workspace_mib", workspace_mib),
    )


def check_tail_smoothing(tail_eps: float | None, label_smoothing: float, softcap: float | None) -> None:
    if tail_eps is not None and label_smoothing and softcap:
        raise ValueError(
            f"tail_eps: {tail_eps} seen with label_smoothing and softcap, None wanted: under a softcap the smoothed part has no rank of 1"
        )


def prepare(
    hidden: Tensor, weight: Tensor, ids: Tensor, name: str, bias: Tensor | None, softcap: float | None, logit_scale: float,
    temperature: float, ignore_index: int | None, tail_eps: float | None, workspace_mib: float | None, check: bool,
    *, mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float, float, float, float | None, float | None]:  # fmt: skip
    """Check the arguments and bring them into the form of the head ops.

    mask: bool of the ids' shape; ids outside it may be anything and are ignored.
    """
    options = head_options(softcap, logit_scale, temperature, ignore_index, tail_eps, workspace_mib)
    transform, ignore_index, tail_eps, workspace_mib = options
    checks.flags(check=check)
    checks.tensors(**{"hidden": hidden, "weight": weight, name: ids})
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight: shape {list(weight.shape)} seen, [V, H] wanted")
    V, H = weight.shape
    if hidden.dim() < 1 or hidden.shape[-1] != H:
        raise ValueError(
            f"hidden: shape {list(hidden.shape)} seen, [..., H] = [..., {H}] wanted, as weight has it"
        )
    checks.supported_device("hidden", hidden)
    kind = hidden.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    checks.dtype("hidden", hidden, checks.FLOATS)
    allowed = (
        (hidden.dtype,) if hidden.dtype in (torch.float32, torch.float64) else (hidden.dtype, torch.float32)
    )
    checks.dtype("weight", weight, allowed)
    checks.device("weight", weight, "hidden", hidden)
    checks.dtype(name, ids, checks.INTEGERS)
    checks.shape(name, ids, tuple(hidden.shape[:-1]), "hidden's leading shape")
    checks.device(name, ids, "hidden", hidden)
    checks.ids(name, ids if mask is None else torch.where(mask, ids, 0), V, ignore_index, check)
    if bias is not None:
        checks.tensor("bias", bias)
        checks.shape("bias", bias, (V,), "[V]")
        checks.dtype("bias", bias, allowed)
        checks.device("bias", bias, "hidden", hidden)
        bias = bias.contiguous()  # the row kernels read it with a stride of 1
    kept = kept_ids(ids, ignore_index)
    if mask is not None:
        kept = torch.where(mask.reshape(-1), kept, -1)
    return hidden.reshape(-1, H), weight, kept, bias, *transform, workspace_mib, tail_eps


def find_way(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, upstream: str
) -> tuple[str, bool, bool, bool]:
    """The way, and which of hidden, weight and bias want a gradient."""
    grad = torch.is_grad_enabled()
    hidden_grad, weight_grad, bias_grad = (
        grad and x is not None and requires_grad(x) for x in (hidden, weight, bias)
    )
    return (
        choose_way(hidden.dtype, hidden_grad, weight_grad or bias_grad, upstream),
        hidden_grad,
        weight_grad,
        bias_grad,
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
    """`linear_cross_entropy`, and the statistics of its tokens from the same pass: [...] each, no gradient, 0
    / False where ignored."""
    label_smoothing, z_loss = loss_options(reduction, label_smoothing, z_loss)
    check_tail_smoothing(tail_eps, label_smoothing, softcap)
    check_loss_tensors(targets, reduction, token_weights, num_items)
    arguments = prepare(
        hidden,
        weight,
        targets,
        "targets",
        bias,
        softcap,
        logit_scale,
        temperature,
        ignore_index,
        tail_eps,
        workspace_mib,
        check,
    )
    flat, _, ids, *_ = arguments
    scale = loss_scale(ids >= 0, reduction, token_weights, num_items, accumulator_dtype(flat.dtype))
    way, *wanted = find_way(flat, weight, bias, "table" if reduction == "none" else "scalar")
    if way == "general" or reduction == "none":
        table = head_table(arguments, wanted)
        loss = reduced(token_loss(table, label_smoothing, z_loss), scale, reduction, targets.shape)
    else:
        total, table, *_ = _head_loss(*arguments[:4], scale, label_smoothing, z_loss, *arguments[4:], *wanted)
        loss = total / 0.0 if reduction == "mean" and ids.numel() == 0 else total
    stats = table.detach().view(len(Stat), *targets.shape)
    return CrossEntropyStats(
        loss, stats[Stat.LOGP], stats[Stat.ENTROPY], stats[Stat.LSE], stats[Stat.TOP1] > 0
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
    """Cross-entropy of targets under softmax(hidden @ weight.T + bias), in nats, without the logits in
    memory.

    z = hidden @ weight.T + bias, then z * logit_scale, then softcap * tanh(z / softcap), then z /
    temperature; a token's loss is -(1 - e) log P[target] - e mean_v log P[v] + z_loss * lse^2 with e =
    label_smoothing.

    Args:
        hidden: [..., H] fp32, bf16, fp16 (fp64 on a CPU). Under autocast it is cast to the autocast dtype.
        weight: [V, H] of hidden's dtype, or fp32 master weights beside bf16 / fp16 hidden states: they are cast for the GEMMs and their
            gradient comes back in fp32, never rounded. bias: [V], likewise.
        targets: [...] int64 or int32 in [0, V), or ignore_index (None: -100, as torch's linear_cross_entropy has it); ignored tokens enter
            no GEMM.
        reduction: "mean" over tokens that are not ignored (over their token_weights, or divided by num_items), "sum", or "none".
        token_weights: [...] float; multiplies each token's loss. Differentiable.
        num_items: divisor of "mean", for accumulation over micro-batches and ranks.
        tail_eps: None for the exact gradient. Else columns of the softmax where no token of a block (256 on a CPU) has a probability
            above it enter the backward GEMMs as a rank-1 matrix with their row and column sums (linear/tail_columns.py): loss and statistics stay exact,
            gradients are off by 0.1 to 0.2 % at 2**-14 and 0.4 to 0.6 % at 2**-12 on a trained model (`tail_report`). 3 GEMMs become
            1 + 2 f, f the share of columns kept; where f > 0.6, as in an untrained model, a block runs exact.
        workspace_mib: MiB for the logits of a chunk of tokens; default 512 on a GPU, on a CPU 96, or 72 beside a gradient of the weight.
            On a CPU, low-precision weights are widened once besides (4 V H bytes).
        check: on CUDA, also check the range of targets (waits for the device); FASTALIGN_CHECK=1 does so everywhere.

    Returns: A scalar, or [...] with reduction="none": fp32, fp64 for fp64. NaN where there is nothing to
        average, as torch has it.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device, range or name.
    """
    return linear_cross_entropy_stats(
        hidden, weight, targets, bias, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
        logit_scale=logit_scale, temperature=temperature, reduction=reduction, token_weights=token_weights, num_items=num_items,
        tail_eps=tail_eps, workspace_mib=workspace_mib, check=check,
    ).loss  # fmt: skip


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int | None = -100,
    tail_eps: float | None = None,
    workspace_mib: float | None = None,
    check: bool = False,
) -> Tensor:
    """log P[id] of each position, [...] in nats (fp32; fp64 for fp64), for any upstream gradient; arguments
    as in `linear_cross_entropy`.

    GEMMs: 1 without gradients, 2 with a frozen weight (LoRA runs), 4 in training. Ignored positions hold 0
    and get no gradient.
    """
    arguments = prepare(
        hidden,
        weight,
        ids,
        "ids",
        bias,
        softcap,
        logit_scale,
        temperature,
        ignore_index,
        tail_eps,
        workspace_mib,
        check,
    )
    way, *wanted = find_way(arguments[0], weight, bias, "logp")
    if way == "frozen_head":
        table, _ = _head_frozen(*arguments, arguments[0][:0].clone())
    else:
        table = head_table(arguments, wanted)
    return table[Stat.LOGP].view(ids.shape)


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
    """logp, entropy and logsumexp of each position (nats, differentiable) and top-1; arguments as in
    `linear_cross_entropy`.

    GEMMs: 1 without gradients, 3 with a frozen weight, 4 in training. Ignored positions hold 0 / False.
    entropy=False leaves it None.
    """
    checks.flags(entropy=entropy)
    arguments = prepare(
        hidden,
        weight,
        ids,
        "ids",
        bias,
        softcap,
        logit_scale,
        temperature,
        ignore_index,
        tail_eps,
        workspace_mib,
        check,
    )
    _, *wanted = find_way(arguments[0], weight, bias, "table")
    return stats_of(head_table(arguments, wanted), ids.shape, entropy)


def _logits_ref(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
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
    """The specification of `linear_token_stats`, and of `linear_logprobs` by its first field: plain PyTorch
    with full logits."""
    transform = Transform(logit_scale, softcap or 0.0, temperature)
    table = row_stats_ref(_logits_ref(hidden, weight, bias), kept_ids(ids, ignore_index), None, transform)
    return stats_of(table, ids.shape, entropy)


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
        _logits_ref(hidden, weight, bias), ids, None, Transform(logit_scale, softcap or 0.0, temperature)
    )
    scale = loss_scale(ids >= 0, reduction, token_weights, num_items, table.dtype)
    return reduced(token_loss(table, label_smoothing, z_loss), scale, reduction, targets.shape)
