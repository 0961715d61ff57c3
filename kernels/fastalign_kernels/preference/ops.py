"""The ops of the preference losses: pairs, unpaired completions, and scores of a reward model.

One pass over S sequences or pairs gives the loss, the metrics, and the gradients of the inputs. The backward
pass scales these gradients by the upstream gradient, so a second derivative is an error. Bytes: 4 S e read, 5
S e written. At S = 10 to 1000 the launches are the cost, and one pass is one launch.

A CPU, and fp64 on a GPU, run the functions of this file. A GPU runs losses_triton.py, whose functions have
the same names and arguments.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, sigmoid, where

from ..autograd import register_row_loss
from ..dispatch import Kernels, accumulator_of, widest
from .arguments import REDUCTIONS
from .formulas import PAIR_LOSSES, softplus


class PairInputs(NamedTuple):
    """Log-probabilities [S] of S pairs in nats, and the tokens [S] of their completions."""

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor | None
    reference_rejected: Tensor | None
    chosen_lengths: Tensor | None  # divides the chosen completion's NLL
    rejected_lengths: Tensor | None  # if given, log-ratios are divided by their lengths


class PairOptions(NamedTuple):
    """The numbers of a pair loss.

    The loss is PAIR_LOSSES's formula at (c - offset, r), plus nll_weight * NLL of the chosen completion.
    """

    beta: float
    label_smoothing: float
    offset: float = 0.0
    nll_weight: float = 0.0


class UnpairedInputs(NamedTuple):
    """Log-probabilities of completions [S] in nats, their labels [S] bool, and KTO's kl, a scalar or None."""

    policy: Tensor
    reference: Tensor
    desirable: Tensor
    kl: Tensor | None


class UnpairedOptions(NamedTuple):
    """The numbers of KTO's loss."""

    beta: float
    desirable_weight: float
    undesirable_weight: float


class ScoreInputs(NamedTuple):
    """A reward model's scores [S] of S pairs, and by how much they should differ."""

    chosen: Tensor
    rejected: Tensor
    margin: Tensor | None


class Outputs(NamedTuple):
    """What a kernel gives, fp32 (fp64 if an input is).

    loss: a scalar, or [S] with reduction="none".
    metrics: the rewards of pairs [2, S] or of completions [1, S]. For scores [2]: the share of pairs whose
        chosen one is higher, and the mean margin.
    grads: d sum of losses / d input, one row of S for each differentiable input.
    """

    loss: Tensor
    metrics: Tensor
    grads: Tensor


# The functions in PyTorch.


def _pairs(inputs: PairInputs, loss_type: str, options: PairOptions, reduction: str) -> Outputs:
    beta, label_smoothing, offset, nll_weight = options
    dtype = accumulator_of(*inputs[:4])
    policy_chosen = c = inputs.policy_chosen.to(dtype)
    r = inputs.policy_rejected.to(dtype)
    if inputs.reference_chosen is not None and inputs.reference_rejected is not None:
        c, r = c - inputs.reference_chosen.to(dtype), r - inputs.reference_rejected.to(dtype)
        rewarded = torch.stack([c, r])  # sums over tokens, whatever the lengths
    n_c = 1 if inputs.chosen_lengths is None else inputs.chosen_lengths.clamp(min=1).to(dtype)
    n_r = 1 if inputs.rejected_lengths is None else inputs.rejected_lengths.clamp(min=1).to(dtype)
    if inputs.rejected_lengths is not None:
        c, r = c / n_c, r / n_r
    if inputs.reference_chosen is None:
        rewarded = torch.stack([c, r])
    losses, d_c, d_r = PAIR_LOSSES[loss_type].formula(
        c - offset if offset else c, r, c.new_full((), beta), c.new_full((), label_smoothing)
    )
    if inputs.rejected_lengths is not None:
        d_c, d_r = d_c / n_c, d_r / n_r
    if nll_weight:  # 0 * -inf is NaN
        losses, d_c = losses - nll_weight * policy_chosen / n_c, d_c - nll_weight / n_c
    return Outputs(reduce_losses(losses, reduction), rewarded * beta, torch.stack([d_c, d_r]))


def _unpaired(inputs: UnpairedInputs, options: UnpairedOptions, reduction: str) -> Outputs:
    policy, reference, desirable, kl = inputs
    dtype = accumulator_of(policy, reference)
    ratio = policy.to(dtype) - reference.to(dtype)
    signed = options.beta * (2 * desirable.to(dtype) - 1)
    weight = where(
        desirable,
        ratio.new_full((), options.desirable_weight),
        ratio.new_full((), options.undesirable_weight),
    )
    x = signed * (ratio if kl is None else ratio - kl.to(dtype))
    unlikely = sigmoid(-x)
    grads = -signed * weight * sigmoid(x) * unlikely
    return Outputs(reduce_losses(weight * unlikely, reduction), (ratio * options.beta)[None], grads[None])


def _scores(inputs: ScoreInputs, center_coefficient: float) -> Outputs:
    dtype = accumulator_of(*inputs)
    c, r = inputs.chosen.to(dtype), inputs.rejected.to(dtype)
    difference = c - r
    x = difference if inputs.margin is None else difference - inputs.margin.to(dtype)
    total = c + r if center_coefficient else torch.zeros_like(c)  # 0 * inf is NaN
    losses = softplus(-x) + center_coefficient * total * total
    right = where(difference.isnan(), difference, c > r)
    unlikely, centering = sigmoid(-x), 2 * center_coefficient * total
    return Outputs(
        losses.mean(),
        torch.stack([right, difference]).mean(1),
        torch.stack([centering - unlikely, centering + unlikely]),
    )


def reduce_losses(losses: Tensor, reduction: str) -> Tensor:
    """Losses [S] by `reduction`: their mean, their sum, or themselves."""
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()


KERNELS = Kernels(
    SimpleNamespace(pairs=_pairs, unpaired=_unpaired, scores=_scores),
    native=None,
    triton=".preference.losses_triton",
    triton_fp64=False,
)


# The ops.


def run_pairs(inputs: PairInputs, loss_type: str, options: PairOptions, reduction: str = "none") -> Outputs:
    """The pair loss `loss_type` without autograd; metrics are beta * log-ratio."""
    return KERNELS.select(widest(*inputs[:4])).pairs(inputs, loss_type, options, reduction)


def run_unpaired(inputs: UnpairedInputs, options: UnpairedOptions, reduction: str = "none") -> Outputs:
    """weight * s(-x) with x = +-beta (policy - reference - kl), without autograd.

    Metrics are beta * log-ratio.
    """
    return KERNELS.select(widest(*inputs[:2])).unpaired(inputs, options, reduction)


def _pairs_forward(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor | None,
    reference_rejected: Tensor | None,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
    loss_type: str,
    options: list[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """`Outputs` of a pair loss; options as in PairOptions, then the reduction's index in REDUCTIONS."""
    inputs = PairInputs(
        policy_chosen, policy_rejected, reference_chosen, reference_rejected, chosen_lengths, rejected_lengths
    )
    return run_pairs(inputs, loss_type, PairOptions(*options[:-1]), _reduction(options))


def _unpaired_forward(
    policy: Tensor, reference: Tensor, desirable: Tensor, kl: Tensor | None, options: list[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """`Outputs` of KTO's loss; options as in UnpairedOptions, then the reduction's index in REDUCTIONS."""
    inputs = UnpairedInputs(policy, reference, desirable, kl)
    return run_unpaired(inputs, UnpairedOptions(*options[:-1]), _reduction(options))


def _scores_forward(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None, center_coefficient: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`Outputs` of the Bradley-Terry loss."""
    inputs = ScoreInputs(chosen, rejected, margin)
    return KERNELS.select(widest(*inputs)).scores(inputs, center_coefficient)


def _reduction(options: list[float]) -> str:
    return REDUCTIONS[int(options[-1])]


def _empty(like: Tensor, *shapes: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(shape, dtype=dtype) for shape in shapes)


def _fake_pairs(policy_chosen, policy_rejected, reference_chosen, reference_rejected, *rest):
    dtype = accumulator_of(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    (S,) = policy_chosen.shape
    loss = (S,) if _reduction(rest[-1]) == "none" else ()
    return _empty(policy_chosen, loss, (2, S), (2, S), dtype=dtype)


def _fake_unpaired(policy, reference, desirable, kl, options):
    (S,) = policy.shape
    loss = (S,) if _reduction(options) == "none" else ()
    return _empty(policy, loss, (1, S), (1, S), dtype=accumulator_of(policy, reference))


def _fake_scores(chosen, rejected, margin, center_coefficient):
    dtype = accumulator_of(chosen, rejected, margin)
    return _empty(chosen, (), (2,), (2, *chosen.shape), dtype=dtype)


def _mean_over(logps: Tensor, options: list[float]) -> int:
    """What the loss of a pair op or of KTO's was divided by."""
    return logps.shape[0] if _reduction(options) == "mean" else 1


pairs_op = register_row_loss(
    "preference_pairs",
    _pairs_forward,
    _fake_pairs,
    divisor=_mean_over,
    losses="dpo_loss, simpo_loss, orpo_loss or cpo_loss",
)
unpaired_op = register_row_loss(
    "preference_unpaired", _unpaired_forward, _fake_unpaired, divisor=_mean_over, losses="kto_loss"
)
scores_op = register_row_loss(
    "preference_scores",
    _scores_forward,
    _fake_scores,
    divisor=lambda chosen, _: chosen.shape[0],
    losses="reward_loss",
)
