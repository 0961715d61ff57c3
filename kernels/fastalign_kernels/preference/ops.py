"""The ops of the preference losses: pairs, unpaired completions, and scores of a reward model.

One pass over S sequences or pairs gives the losses, two metrics, and the gradients of the inputs. The
backward pass scales these gradients by the upstream gradient, so a second derivative is an error. Bytes: 4
S e read, 5 S e written. At S = 10 to 1000 the launches are the cost, and one pass is one launch.

A CPU, and fp64 on a GPU, run the functions of this file. A GPU runs losses_triton.py, whose functions have
the same names and arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, sigmoid, where

from ..autograd import NamedGrads, register_op
from ..dispatch import Kernels
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


class Outputs(NamedTuple):
    """What a kernel writes: losses [S], metrics and grads, fp32 (fp64 if an input is).

    metrics: the rewards of pairs [2, S] or of completions [1, S]. For scores, [2, S]: whether the chosen
        one is higher, and the margin.
    grads: d loss / d input, one row of S for each differentiable input.
    """

    losses: Tensor
    metrics: Tensor
    grads: Tensor

    @classmethod
    def empty(cls, rows: int, *inputs: Tensor | None) -> Outputs:
        given = [x for x in inputs if x is not None]
        dtype = torch.float64 if any(x.dtype == torch.float64 for x in given) else torch.float32
        S = given[0].shape[0]
        losses, metrics, grads = (
            given[0].new_empty(shape, dtype=dtype) for shape in ((S,), (rows, S), (rows, S))
        )
        return cls(losses, metrics, grads)


# The functions in PyTorch. They write into `out`, whose dtype they compute in.


def _pairs(inputs: PairInputs, loss_type: str, options: PairOptions, out: Outputs) -> None:
    losses, rewards, grads = out
    beta, label_smoothing, offset, nll_weight = options
    policy_chosen = c = inputs.policy_chosen.to(losses)
    r = inputs.policy_rejected.to(losses)
    if inputs.reference_chosen is not None and inputs.reference_rejected is not None:
        c, r = c - inputs.reference_chosen.to(losses), r - inputs.reference_rejected.to(losses)
        torch.mul(torch.stack([c, r]), beta, out=rewards)
    n_c = 1 if inputs.chosen_lengths is None else inputs.chosen_lengths.clamp(min=1).to(losses)
    n_r = 1 if inputs.rejected_lengths is None else inputs.rejected_lengths.clamp(min=1).to(losses)
    if inputs.rejected_lengths is not None:
        c, r = c / n_c, r / n_r
    if inputs.reference_chosen is None:
        torch.mul(torch.stack([c, r]), beta, out=rewards)
    value, d_c, d_r = PAIR_LOSSES[loss_type].formula(
        c - offset, r, losses.new_full((), beta), losses.new_full((), label_smoothing)
    )
    if inputs.rejected_lengths is not None:
        d_c, d_r = d_c / n_c, d_r / n_r
    losses.copy_(value - nll_weight * policy_chosen / n_c if nll_weight else value)  # 0 * -inf is NaN
    grads[0] = d_c - nll_weight / n_c
    grads[1] = d_r


def _unpaired(inputs: UnpairedInputs, options: UnpairedOptions, out: Outputs) -> None:
    losses, rewards, grads = out
    policy, reference, desirable, kl = inputs
    ratio = policy.to(losses) - reference.to(losses)
    torch.mul(ratio, options.beta, out=rewards[0])
    signed = options.beta * (2 * desirable.to(losses) - 1)
    weight = where(
        desirable,
        losses.new_full((), options.desirable_weight),
        losses.new_full((), options.undesirable_weight),
    )
    x = signed * (ratio if kl is None else ratio - kl.to(losses))
    losses.copy_(weight * sigmoid(-x))
    grads[0] = -signed * weight * sigmoid(x) * sigmoid(-x)


def _scores(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None, center_coefficient: float, out: Outputs
) -> None:
    losses, metrics, grads = out
    c, r = chosen.to(losses), rejected.to(losses)
    x = c - r if margin is None else c - r - margin.to(losses)
    total = c + r
    losses.copy_(softplus(-x) + center_coefficient * total * total)
    metrics[0], metrics[1] = where((c - r).isnan(), c - r, c > r), c - r
    grads[0] = 2 * center_coefficient * total - sigmoid(-x)
    grads[1] = 2 * center_coefficient * total + sigmoid(-x)


KERNELS = Kernels(
    SimpleNamespace(pairs=_pairs, unpaired=_unpaired, scores=_scores),
    native=None,
    triton=".preference.losses_triton",
    triton_fp64=False,
)


# The ops.


def run_pairs(inputs: PairInputs, loss_type: str, options: PairOptions) -> Outputs:
    """The pair loss `loss_type` without autograd; metrics are beta * log-ratio."""
    out = Outputs.empty(2, *inputs[:4])
    KERNELS.select(out.losses).pairs(inputs, loss_type, options, out)
    return out


def run_unpaired(inputs: UnpairedInputs, options: UnpairedOptions) -> Outputs:
    """weight * s(-x) with x = +-beta (policy - reference - kl), without autograd.

    Metrics are beta * log-ratio.
    """
    out = Outputs.empty(1, *inputs[:2])
    KERNELS.select(out.losses).unpaired(inputs, options, out)
    return out


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
    """`Outputs` of a pair loss; options as in PairOptions."""
    inputs = PairInputs(
        policy_chosen, policy_rejected, reference_chosen, reference_rejected, chosen_lengths, rejected_lengths
    )
    return run_pairs(inputs, loss_type, PairOptions(*options))


def _unpaired_forward(
    policy: Tensor, reference: Tensor, desirable: Tensor, kl: Tensor | None, options: list[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """`Outputs` of KTO's loss; options as in UnpairedOptions."""
    return run_unpaired(UnpairedInputs(policy, reference, desirable, kl), UnpairedOptions(*options))


def _scores_forward(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None, center_coefficient: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`Outputs` of the Bradley-Terry loss."""
    out = Outputs.empty(2, chosen, rejected, margin)
    KERNELS.select(out.losses).scores(chosen, rejected, margin, center_coefficient, out)
    return out


def _register(
    name: str,
    forward: Callable[..., tuple[Tensor, ...]],
    floats: int,
    *,
    differentiable: Sequence[str],
    losses: str,
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The op of a forward pass.

    Its first `floats` inputs set the dtype. The first of these are differentiable.
    """
    rows = len(differentiable)

    def fake(*inputs) -> tuple[Tensor, ...]:
        return Outputs.empty(rows, *inputs[:floats])

    def save(ctx, inputs, output) -> None:
        _, metrics, grads = output
        ctx.mark_non_differentiable(metrics, grads)
        ctx.set_materialize_grads(False)  # else autograd writes zeros as the gradients of metrics and grads
        ctx.save_for_backward(grads, *inputs[:rows])

    def backward(ctx, saved: Sequence[Tensor], upstream: Tensor | None, *_: None) -> NamedGrads:
        if upstream is None:
            return {}
        grads, *inputs = saved
        return {name: row.to(x.dtype) for name, row, x in zip(differentiable, upstream * grads, inputs)}

    return register_op(name, forward, fake, save=save, backward=backward, losses=losses)


pairs_op = _register(
    "preference_pairs",
    _pairs_forward,
    4,
    differentiable=("policy_chosen", "policy_rejected"),
    losses="dpo_loss, simpo_loss, orpo_loss or cpo_loss",
)
unpaired_op = _register(
    "preference_unpaired", _unpaired_forward, 2, differentiable=("policy",), losses="kto_loss"
)
scores_op = _register(
    "preference_scores", _scores_forward, 3, differentiable=("chosen", "rejected"), losses="reward_loss"
)
