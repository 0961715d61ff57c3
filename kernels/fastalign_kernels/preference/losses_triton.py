"""The kernels of preference/losses.py in Triton: one sequence, or pair, a lane. The formulas are preference/formulas.py's
own functions, compiled here.

A formula's source is written once: `_compiled` gives it Triton's meaning of the names it calls. Inputs are
contiguous vectors of any float type; outputs fp32. Latency, not bandwidth: S = 1000 pairs are 36 KB.
"""

from __future__ import annotations

from types import FunctionType

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_options import as_scalar
from .formulas import PAIR_LOSSES

BLOCK = 128
NUM_WARPS = 4  # one lane a thread


@triton.jit
def _log1p(e):
    """log(1 + e) for e in [0, 1]: the rounding of 1 + e cancels in log(u) / (u - 1)."""
    u = 1.0 + e
    return tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + _log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _expm1(x):
    """e^x - 1 for x < 0: near 0 the rounding of e^x cancels in (u - 1) / log(u)."""
    u = tl.exp(x)
    near = (u > 0.5) & (u < 1.0)
    return tl.where(u == 1.0, x, tl.where(near, (u - 1.0) * (x / tl.log(tl.where(near, u, 0.5))), u - 1.0))


# Of its own builtins the interpreter patches what is reached through `tl`, hence functions of ours.
@triton.jit
def _exp(x):
    return tl.exp(x)


@triton.jit
def _log(x):
    return tl.log(x)


@triton.jit
def _where(condition, x, y):
    return tl.where(condition, x, y)


_MEANING = {
    "__name__": __name__, "tl": tl, "softplus": _softplus, "expm1": _expm1, "sigmoid": tl.sigmoid, "exp": _exp,
    "log": _log, "where": _where,
}  # fmt: skip


def _compiled(function: FunctionType) -> triton.JITFunction:
    return triton.jit(FunctionType(function.__code__, _MEANING, function.__name__))


FORMULAS = {name: _compiled(entry.formula) for name, entry in PAIR_LOSSES.items()}  # type: ignore[arg-type]


@triton.jit
def pairs_kernel(
    policy_chosen,  # [S]
    policy_rejected,  # [S]
    reference_chosen,  # [S]; read if HAS_REFERENCE
    reference_rejected,  # [S]; read if HAS_REFERENCE
    chosen_lengths,  # [S] integers; read if HAS_CHOSEN_LENGTHS
    rejected_lengths,  # [S] integers; read if HAS_REJECTED_LENGTHS: log-ratios are then means over tokens
    losses,  # [S]
    rewards,  # [2, S]
    slopes,  # [2, S]
    S,
    beta: tl.float64,
    label_smoothing: tl.float64,
    offset: tl.float64,
    nll: tl.float64,
    FORMULA: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    HAS_CHOSEN_LENGTHS: tl.constexpr,
    HAS_REJECTED_LENGTHS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < S
    beta = as_scalar(beta, tl.float32)
    label_smoothing = as_scalar(label_smoothing, tl.float32)
    offset = as_scalar(offset, tl.float32)
    nll = as_scalar(nll, tl.float32)
    own = tl.load(policy_chosen + i, mask=inside, other=0.0).to(tl.float32)
    c = own
    r = tl.load(policy_rejected + i, mask=inside, other=0.0).to(tl.float32)
    if HAS_REFERENCE:
        c -= tl.load(reference_chosen + i, mask=inside, other=0.0).to(tl.float32)
        r -= tl.load(reference_rejected + i, mask=inside, other=0.0).to(tl.float32)
        tl.store(rewards + i, beta * c, mask=inside)
        tl.store(rewards + S + i, beta * r, mask=inside)
    n_c = tl.full([BLOCK], 1.0, tl.float32)
    n_r = n_c
    if HAS_CHOSEN_LENGTHS:
        n_c = tl.maximum(tl.load(chosen_lengths + i, mask=inside, other=1), 1).to(tl.float32)
    if HAS_REJECTED_LENGTHS:
        n_r = tl.maximum(tl.load(rejected_lengths + i, mask=inside, other=1), 1).to(tl.float32)
        c /= n_c
        r /= n_r
    if not HAS_REFERENCE:
        tl.store(rewards + i, beta * c, mask=inside)
        tl.store(rewards + S + i, beta * r, mask=inside)
    value, d_c, d_r = FORMULA(c - offset, r, beta, label_smoothing)
    if HAS_REJECTED_LENGTHS:
        d_c /= n_c
        d_r /= n_r
    value = tl.where(nll == 0.0, value, value - nll * own / n_c)  # 0 * -inf is NaN
    tl.store(losses + i, value, mask=inside)
    tl.store(slopes + i, d_c - nll / n_c, mask=inside)
    tl.store(slopes + S + i, d_r, mask=inside)


@triton.jit
def unpaired_kernel(
    policy,  # [S]
    reference,  # [S]
    desirable,  # [S] bool
    kl,  # scalar; read if HAS_KL
    losses,  # [S]
    rewards,  # [S]
    slopes,  # [S]
    S,
    beta: tl.float64,
    desirable_weight: tl.float64,
    undesirable_weight: tl.float64,
    HAS_KL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < S
    beta = as_scalar(beta, tl.float32)
    desirable_weight = as_scalar(desirable_weight, tl.float32)
    undesirable_weight = as_scalar(undesirable_weight, tl.float32)
    ratio = tl.load(policy + i, mask=inside, other=0.0).to(tl.float32) - tl.load(
        reference + i, mask=inside, other=0.0
    ).to(tl.float32)
    good = tl.load(desirable + i, mask=inside, other=0) != 0
    tl.store(rewards + i, beta * ratio, mask=inside)
    if HAS_KL:
        ratio -= tl.load(kl).to(tl.float32)
    signed = tl.where(good, beta, -beta)
    weight = tl.where(good, desirable_weight, undesirable_weight)
    x = signed * ratio
    tl.store(losses + i, weight * tl.sigmoid(-x), mask=inside)
    tl.store(slopes + i, -signed * weight * tl.sigmoid(x) * tl.sigmoid(-x), mask=inside)


@triton.jit
def scores_kernel(
    chosen,  # [S]
    rejected,  # [S]
    margin,  # [S]; read if HAS_MARGIN
    losses,  # [S]
    metrics,  # [2, S]
    slopes,  # [2, S]
    S,
    center: tl.float64,
    HAS_MARGIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < S
    center = as_scalar(center, tl.float32)
    c = tl.load(chosen + i, mask=inside, other=0.0).to(tl.float32)
    r = tl.load(rejected + i, mask=inside, other=0.0).to(tl.float32)
    x = c - r
    tl.store(metrics + i, tl.where(x != x, x, (c > r).to(tl.float32)), mask=inside)
    tl.store(metrics + S + i, x, mask=inside)
    if HAS_MARGIN:
        x -= tl.load(margin + i, mask=inside, other=0.0).to(tl.float32)
    total = c + r
    tl.store(losses + i, _softplus(-x) + center * total * total, mask=inside)
    tl.store(slopes + i, 2.0 * center * total - tl.sigmoid(-x), mask=inside)
    tl.store(slopes + S + i, 2.0 * center * total + tl.sigmoid(-x), mask=inside)


def _launch(
    kernel: triton.JITFunction,
    losses: Tensor,
    tensors: list[Tensor | None],
    outputs: list[Tensor],
    *arguments,
    **flags,
) -> None:
    S = losses.shape[0]
    if S == 0:
        return
    inputs = [None if x is None else x.contiguous() for x in tensors]
    with torch.cuda.device_of(losses):  # Triton launches on the current device
        kernel[(triton.cdiv(S, BLOCK),)](
            *inputs, *outputs, S, *arguments, **flags, BLOCK=BLOCK, num_warps=NUM_WARPS
        )


def pairs(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor | None,
    reference_rejected: Tensor | None,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
    loss: str,
    beta: float,
    label_smoothing: float,
    offset: float,
    nll: float,
    losses: Tensor,
    rewards: Tensor,
    slopes: Tensor,
) -> None:
    """Fill losses [S], rewards [2, S], slopes [2, S]; see preference.pairs_op."""
    tensors = [
        policy_chosen,
        policy_rejected,
        reference_chosen,
        reference_rejected,
        chosen_lengths,
        rejected_lengths,
    ]
    _launch(
        pairs_kernel, losses, tensors, [losses, rewards, slopes], beta, label_smoothing, offset, nll, FORMULA=FORMULAS[loss],
        HAS_REFERENCE=reference_chosen is not None, HAS_CHOSEN_LENGTHS=chosen_lengths is not None,
        HAS_REJECTED_LENGTHS=rejected_lengths is not None,
    )  # fmt: skip


def unpaired(
    policy: Tensor,
    reference: Tensor,
    desirable: Tensor,
    kl: Tensor | None,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    losses: Tensor,
    rewards: Tensor,
    slopes: Tensor,
) -> None:
    """Fill losses [S], rewards [1, S], slopes [1, S]; see preference.unpaired_op."""
    outputs = [losses, rewards, slopes]
    flags = {"HAS_KL": kl is not None}
    _launch(
        unpaired_kernel,
        losses,
        [policy, reference, desirable, kl],
        outputs,
        beta,
        desirable_weight,
        undesirable_weight,
        **flags,
    )


def scores(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None,
    center: float,
    losses: Tensor,
    metrics: Tensor,
    slopes: Tensor,
) -> None:
    """Fill losses [S], metrics [2, S], slopes [2, S]; see preference.scores_op."""
    _launch(
        scores_kernel,
        losses,
        [chosen, rejected, margin],
        [losses, metrics, slopes],
        center,
        HAS_MARGIN=margin is not None,
    )
