"""The kernels of preference/ops.py in Triton: a lane computes one pair or one completion.

The formulas of pairs are the functions of formulas.py. `compiled` binds the names that they call to Triton's
functions. Inputs are contiguous vectors of any float type, outputs are fp32. Latency is the cost, not
bandwidth: 1000 pairs are 36 KB. So up to 4096 of them are one program's, which also reduces the losses. More
are reduced by torch. Predicted: one multiprocessor takes about 5 us for 4096 pairs, less than a host takes
for the launches of torch's reductions.
"""

from __future__ import annotations

from functools import cache
from types import FunctionType
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..triton_launch import launch
from ..triton_options import as_scalar
from .formulas import PAIR_LOSSES
from .ops import (
    Outputs,
    PairInputs,
    PairOptions,
    ScoreInputs,
    UnpairedInputs,
    UnpairedOptions,
    reduce_losses,
)


class Block(NamedTuple):
    """How many pairs or completions one program computes."""

    size: int  # pairs or completions
    num_warps: int


BLOCK = Block(128, 4)  # one lane a thread
BLOCKS = (BLOCK, Block(1024, 4), Block(4096, 16))  # one program that also reduces takes the first that fits
LARGEST = BLOCKS[-1]


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


# The interpreter replaces the builtins that are reached through `tl`, hence these functions.
@triton.jit
def _exp(x):
    return tl.exp(x)


@triton.jit
def _log(x):
    return tl.log(x)


@triton.jit
def _where(condition, x, y):
    return tl.where(condition, x, y)


_MEANINGS = {
    "__name__": __name__,
    "tl": tl,
    "softplus": _softplus,
    "expm1": _expm1,
    "sigmoid": tl.sigmoid,
    "exp": _exp,
    "log": _log,
    "where": _where,
}


@cache
def compiled(formula: FunctionType) -> triton.JITFunction:
    """A formula of formulas.py for Triton: the same code, where its names have Triton's meanings."""
    return triton.jit(FunctionType(formula.__code__, _MEANINGS, formula.__name__))


@triton.jit
def _store_reduced(pointer, x, i, S, REDUCTION: tl.constexpr):
    """A vector [S] with REDUCTION "none", else its mean or sum, where one program has all of it."""
    if REDUCTION == "none":
        tl.store(pointer + i, x, mask=i < S)
    else:
        total = tl.sum(tl.where(i < S, x, 0.0).to(tl.float64), 0)
        if REDUCTION == "mean":
            total /= S
        tl.store(pointer, total.to(tl.float32))


@triton.jit
def pairs_kernel(
    policy_chosen,  # [S]
    policy_rejected,  # [S]
    reference_chosen,  # [S]; read if HAS_REFERENCE
    reference_rejected,  # [S]; read if HAS_REFERENCE
    chosen_lengths,  # [S] integers; read if HAS_CHOSEN_LENGTHS
    rejected_lengths,  # [S] integers; read if HAS_REJECTED_LENGTHS: log-ratios are then means over tokens
    loss,  # [S] if REDUCTION == "none", else a scalar
    rewards,  # [2, S]
    grads,  # [2, S]
    S,
    beta: tl.float64,
    label_smoothing: tl.float64,
    offset: tl.float64,
    nll_weight: tl.float64,
    FORMULA: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    HAS_CHOSEN_LENGTHS: tl.constexpr,
    HAS_REJECTED_LENGTHS: tl.constexpr,
    REDUCTION: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    inside = i < S
    beta = as_scalar(beta, tl.float32)
    label_smoothing = as_scalar(label_smoothing, tl.float32)
    offset = as_scalar(offset, tl.float32)
    nll_weight = as_scalar(nll_weight, tl.float32)
    logp = tl.load(policy_chosen + i, mask=inside, other=0.0).to(tl.float32)
    c = logp
    r = tl.load(policy_rejected + i, mask=inside, other=0.0).to(tl.float32)
    if HAS_REFERENCE:
        c -= tl.load(reference_chosen + i, mask=inside, other=0.0).to(tl.float32)
        r -= tl.load(reference_rejected + i, mask=inside, other=0.0).to(tl.float32)
        tl.store(rewards + i, beta * c, mask=inside)
        tl.store(rewards + S + i, beta * r, mask=inside)
    n_c = tl.full([BLOCK_SIZE], 1.0, tl.float32)
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
    value = tl.where(nll_weight == 0.0, value, value - nll_weight * logp / n_c)  # 0 * -inf is NaN
    _store_reduced(loss, value, i, S, REDUCTION)
    tl.store(grads + i, d_c - nll_weight / n_c, mask=inside)
    tl.store(grads + S + i, d_r, mask=inside)


@triton.jit
def unpaired_kernel(
    policy,  # [S]
    reference,  # [S]
    desirable,  # [S] bool
    kl,  # scalar; read if HAS_KL
    loss,  # [S] if REDUCTION == "none", else a scalar
    rewards,  # [S]
    grads,  # [S]
    S,
    beta: tl.float64,
    desirable_weight: tl.float64,
    undesirable_weight: tl.float64,
    HAS_KL: tl.constexpr,
    REDUCTION: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
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
    _store_reduced(loss, weight * tl.sigmoid(-x), i, S, REDUCTION)
    tl.store(grads + i, -signed * weight * tl.sigmoid(x) * tl.sigmoid(-x), mask=inside)


@triton.jit
def scores_kernel(
    chosen,  # [S]
    rejected,  # [S]
    margin,  # [S]; read if HAS_MARGIN
    loss,  # [S] if REDUCTION == "none", else a scalar
    metrics,  # [2, S] if REDUCTION == "none", else [2]
    grads,  # [2, S]
    S,
    center_coefficient: tl.float64,
    HAS_MARGIN: tl.constexpr,
    REDUCTION: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    inside = i < S
    center_coefficient = as_scalar(center_coefficient, tl.float32)
    c = tl.load(chosen + i, mask=inside, other=0.0).to(tl.float32)
    r = tl.load(rejected + i, mask=inside, other=0.0).to(tl.float32)
    x = c - r
    next_metric = S if REDUCTION == "none" else 1
    _store_reduced(metrics, tl.where(x != x, x, (c > r).to(tl.float32)), i, S, REDUCTION)
    _store_reduced(metrics + next_metric, x, i, S, REDUCTION)
    if HAS_MARGIN:
        x -= tl.load(margin + i, mask=inside, other=0.0).to(tl.float32)
    total = tl.where(center_coefficient == 0.0, 0.0, c + r)  # 0 * inf is NaN
    _store_reduced(loss, _softplus(-x) + center_coefficient * total * total, i, S, REDUCTION)
    tl.store(grads + i, 2.0 * center_coefficient * total - tl.sigmoid(-x), mask=inside)
    tl.store(grads + S + i, 2.0 * center_coefficient * total + tl.sigmoid(-x), mask=inside)


def _launch(
    kernel: triton.JITFunction,
    inputs: PairInputs | UnpairedInputs | ScoreInputs,
    rows: int,
    reduction: str,
    *numbers: float,
    **flags,
) -> Outputs:
    """The kernel's outputs; `rows` of grads. A reduction that more than one program would take part in is
    left out."""
    S = inputs[0].shape[0]
    here = reduction if 0 < S <= LARGEST.size else "none"
    block = BLOCK if here == "none" else next(block for block in BLOCKS if block.size >= S)
    is_scores = isinstance(inputs, ScoreInputs)
    loss_shape = (S,) if here == "none" else ()
    metrics_shape = (rows,) if is_scores and here != "none" else (rows, S)
    loss, metrics, grads = (
        inputs[0].new_empty(shape, dtype=torch.float32) for shape in (loss_shape, metrics_shape, (rows, S))
    )
    if S:
        dense = [None if x is None else x.contiguous() for x in inputs]
        launch(
            kernel,
            -(-S // block.size),  # triton.cdiv takes the host 2 us
            (*dense, loss, metrics, grads),
            (S, *numbers),
            **flags,
            REDUCTION=here,
            BLOCK_SIZE=block.size,
            num_warps=block.num_warps,
        )
    if here == reduction:
        return Outputs(loss, metrics, grads)
    return Outputs(reduce_losses(loss, reduction), metrics.mean(1) if is_scores else metrics, grads)


def pairs(inputs: PairInputs, loss_type: str, options: PairOptions, reduction: str) -> Outputs:
    """The loss of pairs, launched for `ops.run_pairs`."""
    return _launch(
        *(pairs_kernel, inputs, 2, reduction, *options),
        FORMULA=compiled(PAIR_LOSSES[loss_type].formula),
        HAS_REFERENCE=inputs.reference_chosen is not None,
        HAS_CHOSEN_LENGTHS=inputs.chosen_lengths is not None,
        HAS_REJECTED_LENGTHS=inputs.rejected_lengths is not None,
    )


def unpaired(inputs: UnpairedInputs, options: UnpairedOptions, reduction: str) -> Outputs:
    """The loss of judged completions, launched for `ops.run_unpaired`."""
    return _launch(unpaired_kernel, inputs, 1, reduction, *options, HAS_KL=inputs.kl is not None)


def scores(inputs: ScoreInputs, center_coefficient: float) -> Outputs:
    """The loss of scores, launched for `ops.scores_op`."""
    return _launch(scores_kernel, inputs, 2, "mean", center_coefficient, HAS_MARGIN=inputs.margin is not None)
