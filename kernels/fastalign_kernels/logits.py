"""Losses and statistics of tokens from logits that already exist.

With z the logits after softcap and temperature, log P = z - logsumexp(z), and all quantities in nats:

    logp = log P[id]    entropy = -sum P log P    lse = logsumexp(z)    top1 = (no logit exceeds the id's)
    cross-entropy of a token = -(1 - e) logp - e mean_v log P[v] + z_loss lse^2,   e = label_smoothing

Without a gradient the logits are read once. With one, a CPU reads them in forward, and reads them and writes
the gradient in backward, which keeps 7 numbers a token. A GPU does all that in the forward pass of a reduced
loss, in one launch whose second read comes from its L2 cache. For comparison, F.cross_entropy's log_softmax
writes and keeps a tensor of the logits' size.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .dispatch import launches
from .logits_ops import gradient_in_forward, token_loss, token_loss_op, token_table
from .ordered_sum import ordered_sum
from .softmax.rows import NeedsStats, Stat, Transform, accumulator_dtype, row_stats_ref
from .torch_func import requires_grad, transforming


class TokenStats(NamedTuple):
    """Statistics of each token: logp, entropy and lse in nats, fp32 (fp64 for fp64 inputs), and top1, bool.

    A field that was not asked for is None.
    """

    logp: Tensor
    entropy: Tensor | None
    lse: Tensor
    top1: Tensor


def kept_ids(ids: Tensor, ignore_index: int | None) -> Tensor:
    """Flat int64 ids of which negative ones are ignored, as the row kernels take them: the ids themselves, if
    ignore_index (None: -100) is negative; else -1 in place of it."""
    ignore_index = -100 if ignore_index is None else ignore_index
    flat = ids.reshape(-1)
    if flat.dtype == torch.int64 and -(2**31) <= ignore_index < 0:
        return flat.contiguous()
    if launches(flat) and abs(ignore_index) < 2**31:
        return on_gpu().kept_ids(flat.contiguous(), ignore_index)
    flat = flat.long()
    return torch.where(flat == ignore_index, -1, flat)


def on_gpu() -> ModuleType:
    """The kernels of token ids; Triton is absent on macOS and Windows."""
    from . import token_ids_triton

    return token_ids_triton


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


def nan_without_tokens(
    total: Tensor, n_tokens: int, reduction: str, num_items: float | Tensor | None
) -> Tensor:
    """total, or NaN for the mean of no token at all.

    With num_items an empty micro-batch adds 0 to the others' sum: NaN would poison a rank's loss.
    """
    return total + math.nan if reduction == "mean" and num_items is None and n_tokens == 0 else total


def reduced(
    loss: Tensor, scale: Tensor, reduction: str, num_items: float | Tensor | None, shape: torch.Size
) -> Tensor:
    """Token losses [N] times their scale: [...] for "none", else their sum."""
    scaled = loss * scale
    if reduction == "none":
        return scaled.view(shape)
    return nan_without_tokens(ordered_sum(scaled), loss.numel(), reduction, num_items)


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


class _Tokens(NamedTuple):
    """Checked arguments in the kernels' form."""

    logits: Tensor  # [B, T, V], unit stride over V
    ids: Tensor  # [B*T] int64, -1 where ignored
    transform: Transform

    def table(self, *, needs: NeedsStats, inplace_backward: bool = False) -> Tensor:
        """The statistics [7, B*T], differentiable; 0 where not needed, on a GPU."""
        logits, ids, (_, softcap, temperature) = self
        # vmap's slices share memory, so autograd would refuse
        inplace_backward = inplace_backward and not transforming()
        return token_table(logits, ids, softcap, temperature, list(needs), inplace_backward)


def _tokens(
    logits: Tensor,
    ids: Tensor,
    name: str,
    transform: Transform,
    ignore_index: int | None,
    check: bool,
) -> _Tokens:
    """Check logits and ids; `name` is the public function's for ids."""
    ignore_index = checks.ignore_index(ignore_index)
    checks.flags(check=check)
    checks.logits(logits)
    checks.tensor(name, ids)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits: got shape {list(logits.shape)}, expected [..., V] with V >= 1")
    checks.dtype("logits", logits, checks.FLOATS)
    checks.supported_device("logits", logits)
    checks.dtype(name, ids, checks.INTEGERS)
    checks.shape(name, ids, tuple(logits.shape[:-1]), "the logits' leading shape")
    checks.device(name, ids, "logits", logits)
    checks.ids(name, ids, logits.shape[-1], ignore_index, check)
    blocks = logits if logits.dim() == 3 else logits.reshape(1, -1, logits.shape[-1])
    if blocks.stride(-1) != 1 and blocks.shape[-1] > 1:
        # contiguous() leaves an empty tensor's strides as they are
        blocks = blocks.clone(memory_format=torch.contiguous_format)
    return _Tokens(blocks, kept_ids(ids, ignore_index), transform)


def _check_inplace(inplace_backward: bool, logits: Tensor) -> None:
    checks.flags(inplace_backward=inplace_backward)
    if inplace_backward and any(
        stride == 0 and size > 1 for size, stride in zip(logits.shape, logits.stride())
    ):
        raise ValueError(
            "inplace_backward: got True with expanded logits, expected logits whose rows do not share memory"
        )


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

    On a CPU the forward pass reads the logits once, and the backward pass reads them and writes a gradient of
    their size. On a GPU the forward pass of a reduced loss writes the gradient too, if there is one, and the
    backward pass scales it where the upstream gradient is not 1. fp16, reduction="none" and inplace_backward
    run as on a CPU.

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
        check: on CUDA targets are not checked without check=True or FASTALIGN_CHECK=1, because the check
            waits for the device. There a negative target is ignored as ignore_index is, and a target of V or
            more makes the loss NaN.

    Returns:
        A scalar, or [...] with reduction="none". fp32 (fp64 for fp64 logits). NaN if there is nothing to
        average, as in torch.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device, range or name.
    """
    label_smoothing, z_loss = loss_options(reduction, label_smoothing, z_loss)
    check_loss_tensors(targets, reduction, token_weights, num_items)
    transform = make_transform(1.0, softcap, temperature)
    tokens = _tokens(logits, targets, "targets", transform, ignore_index, check)
    _check_inplace(inplace_backward, logits)
    dtype = accumulator_dtype(tokens.logits.dtype)
    scale = loss_scale(tokens.ids >= 0, reduction, token_weights, num_items, dtype)
    needs_grad = torch.is_grad_enabled() and requires_grad(tokens.logits)
    if reduction != "none" and not inplace_backward and needs_grad and gradient_in_forward(tokens.logits):
        options = [transform.softcap, transform.temperature, label_smoothing, z_loss]
        total = token_loss_op(tokens.logits, tokens.ids, scale, options)[0]
        return nan_without_tokens(total, targets.numel(), reduction, num_items)
    needs = NeedsStats(mean_logp=label_smoothing != 0, entropy=False)
    table = tokens.table(needs=needs, inplace_backward=inplace_backward)
    return reduced(token_loss(table, label_smoothing, z_loss), scale, reduction, num_items, targets.shape)


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
    `entropy=False` leaves that field None; a GPU then computes less. Errors are those of `cross_entropy`.
    """
    checks.flags(entropy=entropy)
    transform = make_transform(1.0, softcap, temperature)
    tokens = _tokens(logits, ids, "ids", transform, ignore_index, check)
    table = tokens.table(needs=NeedsStats(mean_logp=False, entropy=entropy))
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
        logits,
        ids,
        temperature=temperature,
        softcap=softcap,
        ignore_index=ignore_index,
        entropy=False,
        check=check,
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
    return reduced(token_loss(table, label_smoothing, z_loss), scale, reduction, num_items, targets.shape)
