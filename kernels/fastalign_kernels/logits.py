"""Losses and statistics of tokens from logits that already exist.

With z the logits after softcap and temperature, log P = z - logsumexp(z), and all quantities in nats:

    logp = log P[id]    entropy = -sum P log P    lse = logsumexp(z)    top1 = (no logit exceeds the id's)
    cross-entropy of a token = -(1 - e) logp - e mean_v log P[v] + z_loss lse^2,   e = label_smoothing

One read of the logits forward, one read and one write backward (the bare minimum for a gradient of their
size); the backward pass keeps 7 numbers a token. Peer for comparison: F.cross_entropy's log_softmax writes
and keeps a tensor of the logits' size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .autograd import NamedGrads, register_op
from .ordered_sum import ordered_sum
from .softmax.rows import Stat, Transform, coefficients, row_grad, row_stats, row_stats_ref, traced
from .torch_func import transforming


class TokenStats(NamedTuple):
    """Statistics of each token: logp, entropy and lse in nats, fp32 (fp64 for fp64 inputs), and top1, bool.

    A field that was not asked for is None.
    """

    logp: Tensor
    entropy: Tensor | None
    lse: Tensor
    top1: Tensor


def _table_forward(
    logits: Tensor, ids: Tensor, softcap: float, temperature: float, inplace_backward: bool
) -> Tensor:
    """Statistics [7, B*T] of logits [B, T, V]."""
    return row_stats(logits, ids, None, Transform(1.0, softcap, temperature))


def _fake_table(logits, ids, softcap, temperature, inplace_backward):
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(len(Stat), ids.shape[0], dtype=dtype)


@torch.library.custom_op("fastalign::token_table_grad", mutates_args=())
def _token_table_grad(
    logits: Tensor, ids: Tensor, stats: Tensor, coefficients: Tensor, softcap: float, temperature: float
) -> Tensor:
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    row_grad(logits, ids, None, Transform(1.0, softcap, temperature), stats, coefficients, out)
    return out


@_token_table_grad.register_fake
def _fake_table_grad(logits, ids, stats, coefficients, softcap, temperature):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.custom_op("fastalign::token_table_grad_", mutates_args={"logits"})
def _token_table_grad_(
    logits: Tensor, ids: Tensor, stats: Tensor, coefficients: Tensor, softcap: float, temperature: float
) -> None:
    row_grad(logits, ids, None, Transform(1.0, softcap, temperature), stats, coefficients, logits)


def _setup(ctx, inputs, output) -> None:
    logits, ids, ctx.softcap, ctx.temperature, ctx.inplace_backward = inputs
    ctx.save_for_backward(logits, ids, output)


def _backward(ctx, saved: Sequence[Tensor], grad: Tensor) -> NamedGrads:
    logits, ids, stats = saved
    arguments = (ids, stats, coefficients(grad, stats, logits.shape[-1]), ctx.softcap, ctx.temperature)
    if ctx.inplace_backward and not traced(grad):
        grad_logits = logits.detach()
        _token_table_grad_(grad_logits, *arguments)
    else:
        grad_logits = _token_table_grad(logits, *arguments)
    return {"logits": grad_logits}


_token_table = register_op(
    "token_table",
    _table_forward,
    _fake_table,
    save=_setup,
    backward=_backward,
    losses="cross_entropy, token_logprobs or token_stats",
)


def token_loss(table: Tensor, label_smoothing: float, z_loss: float) -> Tensor:
    """Cross-entropy [N] of each row of a statistics table [7, N], in nats; formula at the top of this
    file."""
    loss = -table[Stat.LOGP]
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * table[Stat.MEAN_LOGP]
    return loss + z_loss * table[Stat.LSE] ** 2 if z_loss else loss


def kept_ids(ids: Tensor, ignore_index: int | None) -> Tensor:
    """Flat int64 ids with -1, the row kernels' mark, in place of ignore_index (None: -100)."""
    flat = ids.reshape(-1).long()
    return torch.where(flat == (-100 if ignore_index is None else ignore_index), -1, flat)


def loss_scale(
    kept: Tensor,
    reduction: str,
    token_weights: Tensor | None,
    num_items: float | Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """What each token's loss is multiplied by, [N]: its weight over the denominator of `reduction`.

    0 for ignored tokens; NaN for a mean of nothing.
    """
    weights = (
        kept.to(dtype)
        if token_weights is None
        else torch.where(kept, token_weights.reshape(-1).to(dtype), 0.0)
    )
    if reduction == "mean":
        return weights / (ordered_sum(weights) if num_items is None else num_items)
    return weights


def reduced(loss: Tensor, scale: Tensor, reduction: str, shape: torch.Size) -> Tensor:
    """Token losses [N] times their scale: [...] for "none", else their sum; the mean of no token at all is
    NaN."""
    scaled = loss * scale
    if reduction == "none":
        return scaled.view(shape)
    total = ordered_sum(scaled)
    return total / 0.0 if reduction == "mean" and loss.numel() == 0 else total


def loss_options(reduction: str, label_smoothing: float, z_loss: float) -> tuple[float, float]:
    """Check the options of a cross-entropy: label_smoothing and z_loss as floats."""
    checks.choice("reduction", reduction, ("mean", "sum", "none"))
    return checks.unit_interval("label_smoothing", label_smoothing), checks.at_least_zero("z_loss", z_loss)


def check_loss_tensors(
    targets: Tensor, reduction: str, token_weights: Tensor | None, num_items: float | Tensor | None
) -> None:
    checks.tensor("targets", targets)
    if num_items is not None and reduction != "mean":
        raise ValueError(
            f"num_items: got {num_items} with reduction={reduction!r}, expected None: "
            "it is the divisor of reduction='mean'"
        )
    checks.divisor("num_items", num_items, "targets", targets)
    if token_weights is not None:
        checks.tensor("token_weights", token_weights)
        checks.shape("token_weights", token_weights, tuple(targets.shape), "the targets' shape")
        checks.dtype("token_weights", token_weights, checks.FLOATS)
        checks.device("token_weights", token_weights, "targets", targets)


def make_transform(logit_scale: float, softcap: float | None, temperature: float) -> Transform:
    return Transform(
        checks.number("logit_scale", logit_scale),
        0.0 if softcap is None else checks.above_zero("softcap", softcap),
        checks.above_zero("temperature", temperature),
    )


def _table(
    logits: Tensor,
    ids: Tensor,
    name: str,
    softcap: float | None,
    temperature: float,
    ignore_index: int | None,
    check: bool,
    inplace_backward: bool = False,
) -> tuple[Tensor, Tensor]:
    """The statistics [7, N] and the ids [N], -1 where ignored."""
    transform = make_transform(1.0, softcap, temperature)
    ignore_index = checks.ignore_index(ignore_index)
    checks.flags(check=check, inplace_backward=inplace_backward)
    checks.tensor("logits", logits)
    checks.tensor(name, ids)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits: got shape {list(logits.shape)}, expected [..., V] with V >= 1")
    checks.dtype("logits", logits, checks.FLOATS)
    checks.supported_device("logits", logits)
    checks.dtype(name, ids, checks.INTEGERS)
    checks.shape(name, ids, tuple(logits.shape[:-1]), "the logits' leading shape")
    checks.device(name, ids, "logits", logits)
    checks.ids(name, ids, logits.shape[-1], ignore_index, check)
    if inplace_backward and any(
        stride == 0 and size > 1 for size, stride in zip(logits.shape, logits.stride())
    ):
        raise ValueError(
            "inplace_backward: got True with expanded logits, expected logits whose rows do not share memory"
        )
    blocks = logits if logits.dim() == 3 else logits.reshape(1, -1, logits.shape[-1])
    if blocks.stride(-1) != 1 and blocks.shape[-1] > 1:
        blocks = blocks.clone(
            memory_format=torch.contiguous_format
        )  # contiguous() leaves an empty tensor's strides as they are
    inplace_backward = (
        inplace_backward and not transforming()
    )  # vmap's slices share memory, so autograd would refuse
    kept = kept_ids(ids, ignore_index)
    return _token_table(blocks, kept, transform.softcap, transform.temperature, inplace_backward), kept


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    num_items: float | Tensor | None = None,
    inplace_backward: bool = False,
    check: bool = False,
) -> Tensor:
    """Cross-entropy of targets under softmax(logits), in nats.

    The forward pass reads the logits once. The backward pass reads and writes them once.

    Args:
        logits: [..., V], fp32, bf16 or fp16 (also fp64 on a CPU), with any strides. Shifted views such as
            logits[:, :-1] are not copied.
        targets: [...], int64 or int32 in [0, V), or ignore_index.
        ignore_index: the target of ignored tokens. None: -100, as in torch's linear_cross_entropy.
        label_smoothing: e in (1 - e) nll + e mean_v(-log P[v]).
        z_loss: adds z_loss * lse^2 to each token's loss.
        softcap: z = softcap * tanh(z / softcap), before the temperature divides.
        temperature: z is divided by it.
        reduction: "mean", "sum" or "none". The mean is over the tokens that are not ignored. Its divisor is
            their number, the sum of their token_weights, or num_items.
        token_weights: [...] float. Multiplies each token's loss. Differentiable.
        num_items: the divisor of "mean", for accumulation over micro-batches and ranks.
        inplace_backward: the backward pass overwrites the logits with their gradient instead of allocating
            one. If another operation saved the logits for backward, autograd raises its in-place error. No
            effect under torch.compile and torch.func.vmap.
        check: on CUDA, also check the range of targets, which waits for the device. FASTALIGN_CHECK=1 does
            so for every call.

    Returns:
        A scalar, or [...] with reduction="none". fp32 (fp64 for fp64 logits). NaN if there is nothing to
        average, as in torch.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device, range or name.
    """
    label_smoothing, z_loss = loss_options(reduction, label_smoothing, z_loss)
    check_loss_tensors(targets, reduction, token_weights, num_items)
    table, ids = _table(
        logits, targets, "targets", softcap, temperature, ignore_index, check, inplace_backward
    )
    scale = loss_scale(ids >= 0, reduction, token_weights, num_items, table.dtype)
    return reduced(token_loss(table, label_smoothing, z_loss), scale, reduction, targets.shape)


def token_stats(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    entropy: bool = True,
    check: bool = False,
) -> TokenStats:
    """logp of ids [...], entropy, logsumexp and top-1 from one read of logits [..., V].

    The first three are in nats and differentiable. Ignored positions hold 0 or False and get no gradient.
    `entropy=False` leaves that field None. Errors are those of `cross_entropy`.
    """
    checks.flags(entropy=entropy)
    table, _ = _table(logits, ids, "ids", softcap, temperature, ignore_index, check)
    return stats_of(table, ids.shape, entropy)


def stats_of(table: Tensor, shape: torch.Size, entropy: bool) -> TokenStats:
    """The public view of a statistics table [7, N]."""
    return TokenStats(
        table[Stat.LOGP].view(shape),
        table[Stat.ENTROPY].view(shape) if entropy else None,
        table[Stat.LSE].view(shape),
        (table[Stat.TOP1] > 0).view(shape),
    )


def token_logprobs(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    check: bool = False,
) -> Tensor:
    """log P[id] of each position, [...] in nats, from one read of logits [..., V].

    The arguments are those of `token_stats`.
    """
    return token_stats(
        logits, ids, temperature=temperature, softcap=softcap, ignore_index=ignore_index, check=check
    ).logp


def token_stats_ref(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    entropy: bool = True,
) -> TokenStats:
    """The specification of `token_stats`."""
    transform = Transform(1.0, softcap or 0.0, temperature)
    rows = logits.reshape(1, -1, logits.shape[-1])
    return stats_of(row_stats_ref(rows, kept_ids(ids, ignore_index), None, transform), ids.shape, entropy)


def cross_entropy_ref(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    num_items: float | Tensor | None = None,
) -> Tensor:
    """The specification of `cross_entropy`."""
    rows = logits.reshape(1, -1, logits.shape[-1])
    ids = kept_ids(targets, ignore_index)
    table = row_stats_ref(rows, ids, None, Transform(1.0, softcap or 0.0, temperature))
    scale = loss_scale(ids >= 0, reduction, token_weights, num_items, table.dtype)
    return reduced(token_loss(table, label_smoothing, z_loss), scale, reduction, targets.shape)
