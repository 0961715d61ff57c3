"""Losses of whole sequences: pairs (DPO and its kin), labelled completions (KTO), scores of a reward model
(Bradley-Terry).

Inputs are log-probabilities [S], one a sequence: log pi(y|x) summed over the completion's tokens, in nats
(`sum_by_sequence` of a head's logp). The formulas of pairs are preference/formulas.py's, for a CPU and, compiled from
the same source, for Triton (preference/losses_triton.py); the specifications are in preference/reference.py. One pass
gives losses, rewards and gradients; the backward pass scales the gradients by what arrives from upstream, so
a second derivative is an error. Bytes: 4 S e read, 5 S e written; at S = 10 to 1000 the launches are the
cost, and this is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, sigmoid, where

from .. import checks
from ..autograd import InputGrads, first_order
from ..dispatch import Kernels
from ..softmax.rows import accumulator_dtype
from ..torch_func import unwrapped
from .formulas import DPO_LOSS_TYPES, PAIR_LOSSES, SMOOTHING, softplus


class PreferenceLoss(NamedTuple):
    """loss: a scalar, or [S] with reduction="none". chosen_rewards, rejected_rewards: [S], beta * log-ratio,
    without gradient."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


class UnpairedLoss(NamedTuple):
    """loss: a scalar, or [S] with reduction="none". rewards: [S], beta * log-ratio, without gradient."""

    loss: Tensor
    rewards: Tensor


class RewardLoss(NamedTuple):
    """Scalars: loss; without gradient, accuracy, the share of pairs whose chosen score is higher, and
    mean_margin of chosen - rejected."""

    loss: Tensor
    accuracy: Tensor
    mean_margin: Tensor


KTO_LOSS_TYPES = ("kto", "apo_zero_unpaired")


# The CPU twins of preference/losses_triton.py's launchers: same arguments, the last three are written.


def _pairs(
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
    own, c, r = policy_chosen.to(losses), policy_chosen.to(losses), policy_rejected.to(losses)
    if reference_chosen is not None and reference_rejected is not None:
        c, r = c - reference_chosen.to(losses), r - reference_rejected.to(losses)
        torch.mul(torch.stack([c, r]), beta, out=rewards)
    n_c = 1 if chosen_lengths is None else chosen_lengths.clamp(min=1).to(losses)
    n_r = 1 if rejected_lengths is None else rejected_lengths.clamp(min=1).to(losses)
    if rejected_lengths is not None:
        c, r = c / n_c, r / n_r
    if reference_chosen is None:
        torch.mul(torch.stack([c, r]), beta, out=rewards)
    value, d_c, d_r = PAIR_LOSSES[loss].formula(
        c - offset, r, losses.new_full((), beta), losses.new_full((), label_smoothing)
    )
    if rejected_lengths is not None:
        d_c, d_r = d_c / n_c, d_r / n_r
    losses.copy_(value - nll * own / n_c if nll else value)  # 0 * -inf is NaN
    slopes[0] = d_c - nll / n_c
    slopes[1] = d_r


def _unpaired(
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
    ratio = policy.to(losses) - reference.to(losses)
    torch.mul(ratio, beta, out=rewards[0])
    signed = beta * (2 * desirable.to(losses) - 1)
    weight = where(desirable, losses.new_full((), desirable_weight), losses.new_full((), undesirable_weight))
    x = signed * (ratio if kl is None else ratio - kl.to(losses))
    losses.copy_(weight * sigmoid(-x))
    slopes[0] = -signed * weight * sigmoid(x) * sigmoid(-x)


def _scores(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None,
    center: float,
    losses: Tensor,
    metrics: Tensor,
    slopes: Tensor,
) -> None:
    c, r = chosen.to(losses), rejected.to(losses)
    x = c - r if margin is None else c - r - margin.to(losses)
    total = c + r
    losses.copy_(softplus(-x) + center * total * total)
    metrics[0], metrics[1] = where((c - r).isnan(), c - r, c > r), c - r
    slopes[0], slopes[1] = 2 * center * total - sigmoid(-x), 2 * center * total + sigmoid(-x)


KERNELS = Kernels(
    SimpleNamespace(pairs=_pairs, unpaired=_unpaired, scores=_scores),
    native_cpu=False,
    triton=".preference.losses_triton",
    triton_fp64=False,
)


def _outputs(rows: int, *tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """losses [S], rewards or metrics [rows, S], slopes = d loss / d each differentiable input [rows, S]:
    fp32, fp64 if any input is."""
    given = [x for x in tensors if x is not None]
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in given) else torch.float32
    S = given[0].shape[0]
    return tuple(given[0].new_empty(shape, dtype=dtype) for shape in ((S,), (rows, S), (rows, S)))  # type: ignore[return-value]


@torch.library.custom_op("fastalign::preference_pairs", mutates_args=())
def pairs_op(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """losses, rewards, slopes of PAIR_LOSSES[loss] at (c - offset, r), plus nll * the chosen completion's own
    NLL.

    rejected_lengths: log-ratios are divided by their lengths. chosen_lengths divides the NLL, with or without
    them.
    """
    tensors = (policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    out = _outputs(2, *tensors)
    KERNELS.select(out[0]).pairs(
        *tensors, chosen_lengths, rejected_lengths, loss, beta, label_smoothing, offset, nll, *out
    )
    return out


@torch.library.custom_op("fastalign::preference_unpaired", mutates_args=())
def unpaired_op(
    policy: Tensor,
    reference: Tensor,
    desirable: Tensor,
    kl: Tensor | None,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """losses, rewards, slopes of weight * s(-x), x = +-beta (policy - reference - kl)."""
    out = _outputs(1, policy, reference)
    KERNELS.select(out[0]).unpaired(
        policy, reference, desirable, kl, beta, desirable_weight, undesirable_weight, *out
    )
    return out


@torch.library.custom_op("fastalign::preference_scores", mutates_args=())
def scores_op(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None, center: float
) -> tuple[Tensor, Tensor, Tensor]:
    """losses, metrics (right, margin), slopes of the Bradley-Terry loss."""
    out = _outputs(2, chosen, rejected, margin)
    KERNELS.select(out[0]).scores(chosen, rejected, margin, center, *out)
    return out


pairs_op.register_fake(lambda *inputs: _outputs(2, *inputs[:4]))
unpaired_op.register_fake(lambda *inputs: _outputs(1, *inputs[:2]))
scores_op.register_fake(lambda *inputs: _outputs(2, *inputs[:3]))


def _setup(ctx, inputs, output) -> None:
    _, metrics, slopes = output
    ctx.mark_non_differentiable(metrics, slopes)
    ctx.set_materialize_grads(False)  # of theirs, which would be zeros to write
    ctx.save_for_backward(slopes, *inputs[: slopes.shape[0]])
    ctx.constants = len(inputs) - slopes.shape[0]


def _backward(ctx, saved: Sequence[Tensor], grad: Tensor | None, *_: None) -> InputGrads:
    slopes, *inputs = saved
    if grad is None:
        return (None,) * (len(inputs) + ctx.constants)
    return *(row.to(x.dtype) for row, x in zip(grad * slopes, inputs)), *[None] * ctx.constants


for _op, _losses in (
    (pairs_op, "dpo_loss, simpo_loss, orpo_loss or cpo_loss"),
    (unpaired_op, "kto_loss"),
    (scores_op, "reward_loss"),
):
    _op.register_autograd(first_order(_losses, _backward), setup_context=_setup)


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    reduction: str = "mean",
) -> PreferenceLoss:
    """Direct preference optimisation of S pairs in one of the forms of `PAIR_LOSSES`, whose functions give
    formula and paper.

    The default is -log sigmoid(beta (c - r)), c and r the log-ratios policy - reference of chosen and
    rejected; ln 2 at the first step.

    Args:
        policy_chosen_logps, policy_rejected_logps: [S] fp32, bf16, fp16 or fp64, summed over the completion's tokens, nats. Differentiable.
        reference_chosen_logps, reference_rejected_logps: [S], of any of these dtypes; never given a gradient.
        beta: strength of the tie to the reference, > 0.
        loss_type: sigmoid, hinge, ipo, robust, exo_pair, nca_pair, bco_pair, sppo_hard, apo_zero, apo_down, discopop, sigmoid_norm.
        label_smoothing: probability that a label is flipped. [0, 0.5) for sigmoid and sigmoid_norm (cDPO) and robust, (0, 0.5) for exo_pair
            (the paper takes 1e-3), 0 for all others.
        chosen_lengths, rejected_lengths: [S] int64 or int32, tokens of each completion (0 counts as 1). sigmoid_norm (Tulu 3, 2411.15124)
            needs them, ipo takes them: log-ratios are then means over tokens, and beta is in these units. Refused elsewhere.
        reduction: "mean" over pairs, "sum" or "none".

    Returns: The loss, and the rewards beta * (policy - reference), sums over tokens for every loss_type.
        fp32; fp64 if an input is.

    Differences from TRL 1.16: label_smoothing works with sigmoid and sigmoid_norm, where TRL ignores it
    without a word, and is refused where it has no meaning. ipo without lengths is the paper's sum over
    tokens; TRL always takes the mean: give lengths. discopop's tau is 0.05, the paper's and TRL's default. No
    f-divergences, aot, sft or weighted mixtures (losses add up outside). bco_pair has delta = 0 as in TRL and
    Liger, so a pair's loss does not depend on its batch; the paper subtracts a running mean delta of the
    rewards: add delta / beta to both references (the rewards returned are then less by delta).

    Raises:
        ValueError: an argument of the wrong shape, dtype, device, range or name.
    """
    checks.choice("loss_type", loss_type, DPO_LOSS_TYPES)
    logps = {
        "policy_chosen_logps": policy_chosen_logps,
        "policy_rejected_logps": policy_rejected_logps,
        "reference_chosen_logps": reference_chosen_logps,
        "reference_rejected_logps": reference_rejected_logps,
    }
    lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
    for name, value in lengths.items():
        if value is not None and PAIR_LOSSES[loss_type].lengths == "refused":
            raise ValueError(
                f"{name}: given with loss_type={loss_type!r}, which takes sums over tokens; None wanted"
            )
        if value is None and (
            PAIR_LOSSES[loss_type].lengths == "needed" or any(x is not None for x in lengths.values())
        ):
            raise ValueError(f"{name}: None seen with loss_type={loss_type!r}, both lengths [S] wanted")
    return _preference(logps, lengths, loss_type, beta, label_smoothing, reduction)


def simpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    *,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float = 2.0,
    gamma: float = 1.0,
    alpha: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> PreferenceLoss:
    """SimPO (2405.14734, eq. 6): -log sigmoid(beta (c - r) - gamma), c and r the mean log-prob of a token of
    chosen and rejected.

    Args: policy_chosen_logps, policy_rejected_logps: [S], sums over tokens, as in `dpo_loss`. chosen_lengths,
        rejected_lengths: [S] int64 or int32, tokens of each completion (0 counts as 1). beta, gamma: scale >
        0 and target margin; gamma / beta = 0.5 and beta = 2 are the paper's starting point. alpha: adds alpha
        * (-c), the chosen completion's NLL a token (CPO-SimPO). label_smoothing: [0, 0.5), as in cDPO.

    Returns:
        The loss, and the rewards beta * c and beta * r.

    Differences from TRL 1.16 (CPOTrainer) and Liger: they default to beta 0.1 and gamma 0.5. Their NLL is a
    mean over the batch's tokens, this one's a mean over pairs of means over tokens, so that micro-batches of
    pairs average to the batch.
    """
    _need_lengths(chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
    logps = {"policy_chosen_logps": policy_chosen_logps, "policy_rejected_logps": policy_rejected_logps}
    lengths: dict[str, Tensor | None] = {
        "chosen_lengths": chosen_lengths,
        "rejected_lengths": rejected_lengths,
    }
    offset = checks.number("gamma / beta", checks.number("gamma", gamma) / checks.above_zero("beta", beta))
    return _preference(
        logps, lengths, "sigmoid", beta, label_smoothing, reduction, offset=offset, alpha=alpha
    )


def orpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    *,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float = 0.1,
    alpha: float = 1.0,
    reduction: str = "mean",
) -> PreferenceLoss:
    """ORPO (2403.07691, eq. 6): -alpha c - beta log sigmoid(log odds(c) - log odds(r)), c and r mean
    log-probs of a token, log odds(c) = c - log(1 - e^c).

    Args:
        policy_chosen_logps, policy_rejected_logps: [S], sums over tokens, as in `dpo_loss`.
        chosen_lengths, rejected_lengths: [S] int64 or int32, tokens of each completion (0 counts as 1).
        beta: weight of the odds ratio, the paper's lambda, > 0.
        alpha: weight of the chosen completion's NLL a token; 1 in the paper.

    Returns:
        The loss, and the rewards beta * c and beta * r.

    Differences from TRL 1.16: its NLL covers the prompt's tokens too and is a mean over the batch's tokens.
    Means above -1e-6 (p = 1 to rounding, where the odds are infinite) count as -1e-6 in the odds and in the
    slope of the odds; TRL has inf and NaN there.
    """
    _need_lengths(chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
    logps = {"policy_chosen_logps": policy_chosen_logps, "policy_rejected_logps": policy_rejected_logps}
    lengths: dict[str, Tensor | None] = {
        "chosen_lengths": chosen_lengths,
        "rejected_lengths": rejected_lengths,
    }
    return _preference(logps, lengths, "odds_ratio", beta, 0.0, reduction, alpha=alpha)


def cpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    reduction: str = "mean",
) -> PreferenceLoss:
    """CPO (2401.08417, eq. 5): -log sigmoid(beta (c - r)) - alpha c, c and r the summed log-probs of chosen
    and rejected.

    Args: policy_chosen_logps, policy_rejected_logps: [S], sums over tokens, as in `dpo_loss`. beta: scale, >
        0. alpha: weight of the chosen completion's NLL, >= 0; 1 in the paper. label_smoothing: [0, 0.5), as
        in cDPO. chosen_lengths: [S] int64 or int32; given, the NLL (and it alone) is a mean over the
        completion's tokens.

    Returns:
        The loss, and the rewards beta * c and beta * r.

    Differences from TRL 1.16: without chosen_lengths the NLL is the paper's sum over tokens; TRL's is a mean
    over the batch's tokens, prompts included. CPO's hinge and ipo are `dpo_loss` with zeros for references;
    AlphaPO is not there.
    """
    logps = {"policy_chosen_logps": policy_chosen_logps, "policy_rejected_logps": policy_rejected_logps}
    lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": None}
    return _preference(logps, lengths, "sigmoid", beta, label_smoothing, reduction, alpha=alpha)


def kto_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    desirable: Tensor,
    kl: Tensor | None,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    loss_type: str = "kto",
    reduction: str = "mean",
) -> UnpairedLoss:
    """KTO (2402.01306, eq. 8) of S labelled completions: weight * (1 - sigmoid(x)); x = beta (policy -
    reference - kl) where desirable and minus that elsewhere. 1/2 at the first step with weights of 1.

    Args:
        policy_logps, reference_logps: [S], summed over the completion's tokens, nats, as in `dpo_loss`; the policy's is differentiable.
        desirable: [S] bool.
        kl: scalar or [1], >= 0, of `kto_kl`, the point of reference; never given a gradient. Not used, and may be None, for
            apo_zero_unpaired.
        beta: strength of the tie to the reference, > 0.
        desirable_weight, undesirable_weight: >= 0. The paper wants their ratio, times that of the numbers of examples, in [1, 4/3].
        loss_type: "kto", or "apo_zero_unpaired" (APO 2408.06266, eq. 7, without pairs): the same with kl = 0.
        reduction: "mean" over completions, "sum" or "none".

    Returns:
        The loss and the rewards beta * (policy - reference), fp32; fp64 if an input is.

    Differences from TRL 1.16: its mean is a nanmean, which hides a broken sequence; here NaN shows.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device, range or name.
    """
    beta, desirable_weight, undesirable_weight = unpaired_options(
        loss_type, beta, desirable_weight, undesirable_weight
    )
    checks.choice("reduction", reduction, ("mean", "sum", "none"))
    checks.tensor("desirable", desirable)
    checks.optional_tensors(kl=kl)
    _check_sequences({"policy_logps": policy_logps, "reference_logps": reference_logps})
    _check_like("desirable", desirable, (torch.bool,), "policy_logps", policy_logps)
    if loss_type == "apo_zero_unpaired":
        kl = None
    elif kl is None:
        raise ValueError("kl: None seen with loss_type='kto', a scalar tensor >= 0 wanted")
    else:
        kl = scalar_kl(kl)
        checks.shape("kl", kl, (), "a scalar")
        checks.dtype("kl", kl, checks.FLOATS)
        checks.device("kl", kl, "policy_logps", policy_logps)
        _check_least_zero("kl", kl)
    losses, rewards, _ = unpaired_op(
        policy_logps.reshape(-1),
        reference_logps.reshape(-1),
        desirable.reshape(-1),
        kl,
        beta,
        desirable_weight,
        undesirable_weight,
    )
    return UnpairedLoss(
        reduce_losses(losses, reduction, policy_logps.shape), rewards[0].view(policy_logps.shape)
    )


@torch.no_grad()
def kto_kl(
    policy_mismatched_logps: Tensor,
    reference_mismatched_logps: Tensor,
    *,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """KTO's point of reference (2402.01306, section 4.1): max(0, mean(policy - reference)) over completions
    paired with others' prompts.

    Args: policy_mismatched_logps, reference_mismatched_logps: [S], summed over the completion's tokens, nats.
        group: the mean is over the sequences of all its ranks, of which some may have none; every rank must
        call. None: this process's.

    Returns: A scalar without gradient, fp32; fp64 if an input is. NaN where no rank has a sequence. The host
        waits for nothing.

    Differences from TRL 1.16: it averages the ranks' means, whatever their numbers of sequences.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device.
    """
    checks.process_group(group)
    _check_sequences(
        {
            "policy_mismatched_logps": policy_mismatched_logps,
            "reference_mismatched_logps": reference_mismatched_logps,
        }
    )
    # In fp64: counts are exact, and a sum of many sequences of -10^4 nats loses nothing.
    total = (policy_mismatched_logps.double() - reference_mismatched_logps.double()).sum()
    sums = torch.stack([total, torch.full_like(total, policy_mismatched_logps.numel())])
    if group is not None:
        torch.distributed.all_reduce(sums, group=group)
    kl = (sums[0] / sums[1]).clamp(min=0)
    return kl.to(
        accumulator_dtype(
            torch.promote_types(policy_mismatched_logps.dtype, reference_mismatched_logps.dtype)
        )
    )


def reward_loss(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    margin: Tensor | None = None,
    *,
    center_coefficient: float = 0.0,
) -> RewardLoss:
    """Bradley-Terry loss of a reward model: mean(-log sigmoid(chosen - rejected - margin) +
    center_coefficient (chosen + rejected)^2).

    ln 2 for a head of zeros. margin: Llama 2 (2307.09288, eq. 2); centring: Eisenstein et al. (2312.09244).

    Args: chosen_scores, rejected_scores: [S] fp32, bf16, fp16 or fp64. Differentiable. margin: [S], by how
        much each pair's chosen score is asked to be the higher; never given a gradient. center_coefficient:
        >= 0; draws the scores, of which the first term sees differences only, towards a mean of 0 (TRL
        suggests 0.01).

    Returns: The loss; accuracy, the share of pairs with chosen > rejected (a tie is wrong, a NaN among the
        scores makes it NaN); mean_margin of chosen - rejected. fp32; fp64 if an input is. NaN where S = 0.
        Same values as TRL 1.16's RewardTrainer.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range.
    """
    center_coefficient = checks.at_least_zero("center_coefficient", center_coefficient)
    scores = {"chosen_scores": chosen_scores, "rejected_scores": rejected_scores}
    _check_sequences(scores if margin is None else scores | {"margin": margin})
    asked = None if margin is None else margin.reshape(-1)
    losses, metrics, _ = scores_op(
        chosen_scores.reshape(-1), rejected_scores.reshape(-1), asked, center_coefficient
    )
    accuracy, mean_margin = metrics.mean(1).unbind()
    return RewardLoss(losses.mean(), accuracy, mean_margin)


def _preference(
    logps: dict[str, Tensor],
    lengths: dict[str, Tensor | None],
    loss_type: str,
    beta: float,
    label_smoothing: float,
    reduction: str,
    offset: float = 0.0,
    alpha: float = 0.0,
) -> PreferenceLoss:
    """Check what all losses of pairs share, and run them. logps: policy's chosen and rejected, and the
    reference's where there is one."""
    checks.choice("reduction", reduction, ("mean", "sum", "none"))
    beta, label_smoothing = _pair_numbers(loss_type, beta, label_smoothing)
    alpha = checks.at_least_zero("alpha", alpha)
    _check_sequences(logps)
    name, like = next(iter(logps.items()))
    for key, value in lengths.items():
        if value is not None:
            checks.tensor(key, value)
            _check_like(key, value, checks.INTEGERS, name, like)
            _check_least_zero(key, value)
    flat = [x.reshape(-1) for x in logps.values()]
    flat_lengths = [None if x is None else x.reshape(-1) for x in lengths.values()]
    references = flat[2:] if len(flat) == 4 else (None, None)
    losses, rewards, _ = pairs_op(
        *flat[:2], *references, *flat_lengths, loss_type, beta, label_smoothing, offset, alpha
    )
    chosen, rejected = rewards.unbind()
    return PreferenceLoss(
        reduce_losses(losses, reduction, like.shape), chosen.view(like.shape), rejected.view(like.shape)
    )


def pair_options(loss_type: str, beta: float, label_smoothing: float) -> tuple[float, float]:
    """Check the options of `dpo_loss`: beta and label_smoothing as floats."""
    checks.choice("loss_type", loss_type, DPO_LOSS_TYPES)
    return _pair_numbers(loss_type, beta, label_smoothing)


def _pair_numbers(loss_type: str, beta: float, label_smoothing: float) -> tuple[float, float]:
    beta = checks.above_zero("beta", beta)
    label_smoothing = checks.number("label_smoothing", label_smoothing)
    wanted = PAIR_LOSSES[loss_type].smoothing
    if not SMOOTHING[wanted](label_smoothing):
        raise ValueError(
            f"label_smoothing: {label_smoothing} seen with loss_type={loss_type!r}, {wanted} wanted"
        )
    return beta, label_smoothing


def unpaired_options(
    loss_type: str, beta: float, desirable_weight: float, undesirable_weight: float
) -> tuple[float, float, float]:
    """Check the options of `kto_loss`: its numbers as floats."""
    checks.choice("loss_type", loss_type, KTO_LOSS_TYPES)
    return (
        checks.above_zero("beta", beta),
        checks.at_least_zero("desirable_weight", desirable_weight),
        checks.at_least_zero("undesirable_weight", undesirable_weight),
    )


def scalar_kl(kl: Tensor) -> Tensor:
    """The kl of `kto_loss` as a scalar; some trainers have it in a tensor [1]."""
    return kl.view(()) if kl.shape == (1,) else kl


def reduce_losses(losses: Tensor, reduction: str, shape: torch.Size) -> Tensor:
    if reduction == "none":
        return losses.view(shape)
    return losses.mean() if reduction == "mean" else losses.sum()


def _check_sequences(tensors: dict[str, Tensor]) -> None:
    """All floating point, of the first one's shape and device."""
    checks.tensors(**tensors)
    first, like = next(iter(tensors.items()))
    checks.supported_device(first, like)
    for name, tensor in tensors.items():
        _check_like(name, tensor, checks.FLOATS, first, like)


def _check_like(
    name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...], like_name: str, like: Tensor
) -> None:
    checks.dtype(name, tensor, allowed)
    checks.shape(name, tensor, tuple(like.shape), f"the shape of {like_name}")
    checks.device(name, tensor, like_name, like)


def _check_least_zero(name: str, tensor: Tensor) -> None:
    tensor = unwrapped(tensor)
    if checks.readable(tensor) and (tensor < 0).any():
        raise ValueError(f"{name}: {tensor.min().item()} seen, values >= 0 wanted")


def _need_lengths(**lengths: Tensor | None) -> None:
    for name, value in lengths.items():
        if value is None:
            raise ValueError(f"{name}: None seen, tokens of each completion [S] wanted")
