"""The preference losses: of pairs (DPO and its kin), labelled completions (KTO), and scores of a reward
model.

Inputs are log-probabilities [S], one for each sequence: log pi(y|x) summed over the completion's tokens, in
nats (`sum_by_sequence` of a head's logp). formulas.py has the formulas of pairs, ops.py runs them, and
reference.py specifies all losses.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .. import checks
from ..softmax.rows import accumulator_dtype
from .arguments import (
    REDUCTIONS,
    check_kl,
    check_lengths,
    check_lengths_of_type,
    check_sequences,
    need_lengths,
    pair_numbers,
    unpaired_options,
)
from .formulas import DPO_LOSS_TYPES
from .ops import PairOptions, pairs_op, scores_op, unpaired_op
from .results import PreferenceLoss, RewardLoss, UnpairedLoss


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
    """Direct preference optimisation of S pairs, in one of the forms of `PAIR_LOSSES`.

    The functions in `PAIR_LOSSES` give each form's formula and paper. The default is
    -log sigmoid(beta (c - r)), where c and r are the log-ratios policy - reference of the chosen and the
    rejected completion. It is ln 2 at the first step.

    Args:
        policy_chosen_logps, policy_rejected_logps: [S], fp32, bf16, fp16 or fp64. Sums over the completion's
            tokens, in nats. Differentiable.
        reference_chosen_logps, reference_rejected_logps: [S], of any of these dtypes. Get no gradient.
        beta: > 0, the strength of the tie to the reference.
        loss_type: one of {loss_types}.
        label_smoothing: the probability that a label is flipped. In [0, 0.5) for sigmoid and sigmoid_norm
            (cDPO) and for robust, in (0, 0.5) for exo_pair (1e-3 in its paper), 0 for the rest.
        chosen_lengths, rejected_lengths: [S], int64 or int32. The number of tokens of each completion; 0
            counts as 1. sigmoid_norm (Tulu 3, 2411.15124) requires them, ipo accepts them, and the rest
            refuse them. With lengths the log-ratios are means over tokens, and beta is in these units.
        reduction: "mean" over pairs, "sum" or "none".

    Returns:
        The loss, and the rewards beta * (policy - reference), which are sums over tokens for every loss_type.
        fp32 (fp64 if an input is).

    Differences from TRL 1.16:
        label_smoothing works with sigmoid and sigmoid_norm, where TRL silently ignores it. It is refused
            where it has no meaning.
        ipo without lengths is the paper's sum over tokens. TRL always takes the mean; pass lengths for that.
        discopop's tau is 0.05, the paper's value and TRL's default.
        f-divergences, aot, sft and weighted mixtures are missing. Add losses up outside for a mixture.
        bco_pair has delta = 0, as in TRL and Liger, so a pair's loss does not depend on its batch. The paper
            subtracts a running mean delta of the rewards. For that, add delta / beta to both references. The
            returned rewards are then smaller by delta.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device, range or name.
    """
    checks.choice("loss_type", loss_type, DPO_LOSS_TYPES)
    logps = {
        "policy_chosen_logps": policy_chosen_logps,
        "policy_rejected_logps": policy_rejected_logps,
        "reference_chosen_logps": reference_chosen_logps,
        "reference_rejected_logps": reference_rejected_logps,
    }
    lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
    check_lengths_of_type(lengths, loss_type)
    return _pair_loss(logps, lengths, loss_type, PairOptions(beta, label_smoothing), reduction)


if dpo_loss.__doc__:  # python -OO has none
    dpo_loss.__doc__ = dpo_loss.__doc__.replace("{loss_types}", ", ".join(DPO_LOSS_TYPES))


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
    """SimPO (2405.14734, eq. 6): -log sigmoid(beta (c - r) - gamma).

    c and r are the mean log-probabilities of a token of the chosen and the rejected completion.

    Args:
        policy_chosen_logps, policy_rejected_logps: [S], sums over tokens, as in `dpo_loss`.
        chosen_lengths, rejected_lengths: [S], int64 or int32. The number of tokens of each completion; 0
            counts as 1.
        beta: scale, > 0. The paper starts from beta = 2.
        gamma: target margin. The paper starts from gamma / beta = 0.5.
        alpha: adds alpha * (-c), the chosen completion's NLL a token (CPO-SimPO).
        label_smoothing: in [0, 0.5), as in cDPO.
        reduction: as in `dpo_loss`.

    Returns:
        The loss, and the rewards beta * c and beta * r.

    Differences from TRL 1.16 (CPOTrainer) and Liger: they default to beta 0.1 and gamma 0.5. Their NLL is a
    mean over the batch's tokens. Here it is a mean over pairs of means over tokens, so the losses of
    micro-batches of pairs average to the batch's.
    """
    need_lengths(chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
    logps = {"policy_chosen_logps": policy_chosen_logps, "policy_rejected_logps": policy_rejected_logps}
    lengths: dict[str, Tensor | None] = {
        "chosen_lengths": chosen_lengths,
        "rejected_lengths": rejected_lengths,
    }
    offset = checks.number("gamma / beta", checks.number("gamma", gamma) / checks.above_zero("beta", beta))
    options = PairOptions(beta, label_smoothing, offset=offset, nll_weight=alpha)
    return _pair_loss(logps, lengths, "sigmoid", options, reduction)


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
    """ORPO (2403.07691, eq. 6): -alpha c - beta log sigmoid(log odds(c) - log odds(r)).

    c and r are the mean log-probabilities of a token, and log odds(c) = c - log(1 - e^c).

    Args:
        policy_chosen_logps, policy_rejected_logps: [S], sums over tokens, as in `dpo_loss`.
        chosen_lengths, rejected_lengths: [S], int64 or int32. The number of tokens of each completion; 0
            counts as 1.
        beta: > 0, the weight of the odds ratio (the paper's lambda).
        alpha: the weight of the chosen completion's NLL a token. 1 in the paper.
        reduction: as in `dpo_loss`.

    Returns:
        The loss, and the rewards beta * c and beta * r.

    Differences from TRL 1.16: TRL's NLL also covers the prompt's tokens, and it is a mean over the batch's
    tokens. Here a mean above -1e-6 counts as -1e-6 in the odds and in their slope, because p rounds to 1 and
    the odds are infinite. TRL has inf and NaN there.
    """
    need_lengths(chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
    logps = {"policy_chosen_logps": policy_chosen_logps, "policy_rejected_logps": policy_rejected_logps}
    lengths: dict[str, Tensor | None] = {
        "chosen_lengths": chosen_lengths,
        "rejected_lengths": rejected_lengths,
    }
    options = PairOptions(beta, label_smoothing=0.0, nll_weight=alpha)
    return _pair_loss(logps, lengths, "odds_ratio", options, reduction)


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
    """CPO (2401.08417, eq. 5): -log sigmoid(beta (c - r)) - alpha c.

    c and r are the summed log-probabilities of the chosen and the rejected completion.

    Args:
        policy_chosen_logps, policy_rejected_logps: [S], sums over tokens, as in `dpo_loss`.
        beta: scale, > 0.
        alpha: >= 0, the weight of the chosen completion's NLL. 1 in the paper.
        label_smoothing: in [0, 0.5), as in cDPO.
        chosen_lengths: [S], int64 or int32. If given, the NLL, and only the NLL, is a mean over the
            completion's tokens.
        reduction: as in `dpo_loss`.

    Returns:
        The loss, and the rewards beta * c and beta * r.

    Differences from TRL 1.16: without chosen_lengths the NLL is the paper's sum over tokens. TRL's is a mean
    over the tokens of all chosen completions of the batch. For CPO's hinge and ipo, call `dpo_loss` with
    zeros as references. AlphaPO is missing.
    """
    logps = {"policy_chosen_logps": policy_chosen_logps, "policy_rejected_logps": policy_rejected_logps}
    lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": None}
    options = PairOptions(beta, label_smoothing, nll_weight=alpha)
    return _pair_loss(logps, lengths, "sigmoid", options, reduction)


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
    """KTO (2402.01306, eq. 8) of S labelled completions: weight * (1 - sigmoid(x)).

    x = beta (policy - reference - kl) for a desirable completion, and minus that for an undesirable one. With
    weights of 1 the loss is 1/2 at the first step.

    Args:
        policy_logps, reference_logps: [S]. Sums over the completion's tokens, in nats, as in `dpo_loss`.
            policy_logps is differentiable.
        desirable: [S] bool.
        kl: scalar or [1], >= 0: the reference point, from `kto_kl`. Gets no gradient. apo_zero_unpaired
            does not use it, so it may be None there.
        beta: > 0, the strength of the tie to the reference.
        desirable_weight, undesirable_weight: >= 0. The paper wants desirable_weight * (number of desirable
            examples) over undesirable_weight * (number of undesirable ones) in [1, 4/3].
        loss_type: "kto", or "apo_zero_unpaired" (APO 2408.06266, eq. 7, without pairs): the same with kl = 0.
        reduction: "mean" over completions, "sum" or "none".

    Returns:
        The loss and the rewards beta * (policy - reference), fp32 (fp64 if an input is).

    Differences from TRL 1.16: its mean is a nanmean, which hides a broken sequence. Here the NaN shows.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device, range or name.
    """
    beta, desirable_weight, undesirable_weight = unpaired_options(
        loss_type, beta, desirable_weight, undesirable_weight
    )
    checks.choice("reduction", reduction, REDUCTIONS)
    checks.tensor("desirable", desirable)
    checks.optional_tensors(kl=kl)
    check_sequences({"policy_logps": policy_logps, "reference_logps": reference_logps})
    checks.like("desirable", desirable, (torch.bool,), "policy_logps", policy_logps)
    kl = check_kl(kl, "policy_logps", policy_logps) if loss_type == "kto" else None
    options = [beta, desirable_weight, undesirable_weight, REDUCTIONS.index(reduction)]
    flat = (_flat(x) for x in (policy_logps, reference_logps, desirable))
    loss, rewards, _ = unpaired_op(*flat, kl, options)
    return UnpairedLoss(_shaped(loss, policy_logps), _shaped(rewards[0], policy_logps))


@torch.no_grad()
def kto_kl(
    policy_mismatched_logps: Tensor,
    reference_mismatched_logps: Tensor,
    *,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """KTO's reference point (2402.01306, section 4.1): max(0, mean(policy - reference)), without gradient.

    The mean is over completions that were paired with prompts of other examples.

    Args:
        policy_mismatched_logps, reference_mismatched_logps: [S]. Sums over the completion's tokens, in nats.
        group: the mean is over the sequences of all its ranks. A rank may have none, but every rank must
            call. None: this process's sequences.

    Returns:
        A scalar, fp32 (fp64 if an input is). NaN if no rank has a sequence. The host does not wait for the
        device.

    Differences from TRL 1.16: TRL averages the ranks' means without regard to their numbers of sequences.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
    """
    checks.process_group(group)
    check_sequences(
        {
            "policy_mismatched_logps": policy_mismatched_logps,
            "reference_mismatched_logps": reference_mismatched_logps,
        }
    )
    # In fp64: counts are exact, and a sum of many sequences of -10^4 nats loses nothing.
    total = (policy_mismatched_logps.double() - reference_mismatched_logps.double()).sum()
    number = policy_mismatched_logps.numel()
    if group is None:
        mean = total / number
    else:
        sums = torch.stack([total, torch.full_like(total, number)])
        torch.distributed.all_reduce(sums, group=group)
        mean = sums[0] / sums[1]
    dtype = torch.promote_types(policy_mismatched_logps.dtype, reference_mismatched_logps.dtype)
    return mean.clamp(min=0).to(accumulator_dtype(dtype))


def reward_loss(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    margin: Tensor | None = None,
    *,
    center_coefficient: float = 0.0,
) -> RewardLoss:
    """Bradley-Terry loss of a reward model.

    mean(-log sigmoid(chosen - rejected - margin) + center_coefficient (chosen + rejected)^2). It is ln 2
    for a head of zeros. The margin is from Llama 2 (2307.09288, eq. 2), the centring from Eisenstein et al.
    (2312.09244).

    Args:
        chosen_scores, rejected_scores: [S], fp32, bf16, fp16 or fp64. Differentiable.
        margin: [S], by how much each pair's chosen score should exceed the rejected one. Gets no gradient.
        center_coefficient: >= 0 (TRL suggests 0.01). Draws the scores towards a mean of 0, because the
            first term depends on their differences only.

    Returns:
        Scalars, fp32 (fp64 if an input is), NaN if S = 0. The loss; accuracy, the share of pairs with
        chosen > rejected (a tie is wrong, a NaN among the scores makes it NaN); mean_margin, the mean of
        chosen - rejected. The values are those of TRL 1.16's RewardTrainer.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range.
    """
    center_coefficient = checks.at_least_zero("center_coefficient", center_coefficient)
    scores = {"chosen_scores": chosen_scores, "rejected_scores": rejected_scores}
    check_sequences(scores if margin is None else scores | {"margin": margin})
    flat = (_flat(x) for x in (chosen_scores, rejected_scores, margin))
    loss, metrics, _ = scores_op(*flat, center_coefficient)
    return RewardLoss(loss, *metrics.unbind())


def _pair_loss(
    logps: Mapping[str, Tensor],
    lengths: Mapping[str, Tensor | None],
    loss_type: str,
    options: PairOptions,
    reduction: str,
) -> PreferenceLoss:
    """Check what all losses of pairs share, and run them.

    logps: the policy's of the chosen and the rejected completions, then the reference's if there is one.
    """
    checks.choice("reduction", reduction, REDUCTIONS)
    beta, label_smoothing = pair_numbers(loss_type, options.beta, options.label_smoothing)
    nll_weight = checks.at_least_zero("alpha", options.nll_weight)
    check_sequences(logps)
    name, like = next(iter(logps.items()))
    check_lengths(lengths, name, like)
    flat = [_flat(x) for x in logps.values()]
    references = flat[2:] if len(flat) == 4 else (None, None)
    numbers = [beta, label_smoothing, options.offset, nll_weight, REDUCTIONS.index(reduction)]
    loss, rewards, _ = pairs_op(
        *flat[:2], *references, *(_flat(x) for x in lengths.values()), loss_type, numbers
    )
    chosen, rejected = rewards.unbind()
    return PreferenceLoss(_shaped(loss, like), _shaped(chosen, like), _shaped(rejected, like))


def _flat(x: Tensor | None) -> Tensor | None:
    """[S]. A view would cost some microseconds here and in the backward pass."""
    return x if x is None or x.dim() == 1 else x.reshape(-1)


def _shaped(x: Tensor, like: Tensor) -> Tensor:
    """A vector [S] in the shape of `like`; a scalar as it is."""
    return x if x.dim() == 0 or like.dim() == 1 else x.view(like.shape)
