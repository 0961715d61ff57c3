"""PPO's rollout: completions of prompts with their scores, values and advantages.

`rollout` is a plain function that you can call from your own loop, as is ppo.py's `ppo_step`, which learns
from its result.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign_kernels import gae, masked_whiten
from fastalign_kernels.sampling_kept import KeptIds

from ...actor_critic import ActorCritic
from ...data.tokens import Prompt
from ..batches import Batch
from ..policy_configs import PPOOptions
from .rollouts import Drawn, Score, draw_completions, estimate_kl, token_batch


class Experience(NamedTuple):
    """The completions of a step's prompts, of all ranks, with what `ppo_step` learns from them.

    B completions of at most R tokens. `mask`: bool [B, R]. Of its shape, in nats or units of the reward:
    `old_logp`, `reference_logp` (None without a reference), `values`, `advantages`, `returns`. `scores`:
    [B]. `metrics`: those of the rollout. `kept`: as in `Drawn`.
    """

    prompts: list[list[int]]
    completions: Sequence[list[int]]
    mask: Tensor
    old_logp: Tensor
    reference_logp: Tensor | None
    values: Tensor
    advantages: Tensor
    returns: Tensor
    scores: Tensor
    metrics: dict[str, float]
    kept: Sequence[KeptIds] | None = None


@torch.no_grad()
def rollout(
    model: ActorCritic, prompts: Sequence[Prompt], score: Score, options: PPOOptions, **given: Any
) -> Experience:
    """Complete the prompts, score the completions, and estimate the advantage of each token.

    `given` are the keywords of `draw_completions`: eos_id and pad_id, and if wanted reference, seed, step,
    micro_batch_size, rollout_batch_size, packing, precision and world.

    Metrics beside those that `draw_completions` lists, means over the completions unless noted:

        objective/non_score_reward: the KL divergence's share of the rewards.
        objective/rlhf_reward: its sum with objective/scores.
        val/explained_variance: of the returns by the old values, over tokens.
        kl_coef: the coefficient of this step.

    Raises FloatingPointError for logits that are not finite.
    """
    read = model if model.shared else model.value
    values = {"values": (read, lambda batch: model.values(batch["arguments"], batch["at"]))}
    drawn = draw_completions(model.policy, prompts, score, options, **given, further=values)
    return _estimate(model, options, drawn)


def _estimate(model: ActorCritic, options: PPOOptions, drawn: Drawn) -> Experience:
    """Rewards, advantages and metrics of the completions of all ranks."""
    mask, old, scores, values = drawn.mask, drawn.old_logp, drawn.scores, drawn.further["values"]
    kl_reward = torch.zeros_like(old)
    if options.kl_in == "reward":
        kl_reward = -float(model.kl_coefficient) * estimate_kl(drawn.log_ratio(), options.estimator) * mask
    rewards = kl_reward.scatter_add(1, mask.sum(1, keepdim=True) - 1, scores[:, None].to(old.dtype))
    if options.whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(rewards, values, mask, gamma=options.gamma, lam=options.lam)
    spread = returns[mask].double().var(correction=0)
    unexplained = (returns - values)[mask].double().var(correction=0)
    if options.whiten_advantages:
        advantages = masked_whiten(advantages, mask)
    metrics = drawn.metrics(options) | {
        "objective/non_score_reward": kl_reward.sum(1).mean(),
        "objective/rlhf_reward": kl_reward.sum(1).mean() + scores.mean(),
        "val/explained_variance": torch.where(spread > 0, 1 - unexplained / spread, 0.0),
        "kl_coef": model.kl_coefficient,
    }
    weight = drawn.importance(options.importance_cap)
    if weight is not None:
        advantages = advantages * weight
    numbers = dict(
        zip(metrics, torch.stack([value.double() for value in metrics.values()]).tolist(), strict=True)
    )
    return Experience(
        prompts=drawn.prompts,
        completions=drawn.completions,
        mask=mask,
        old_logp=old,
        reference_logp=drawn.reference_logp,
        values=values,
        advantages=advantages,
        returns=returns,
        scores=scores,
        metrics=numbers,
        kept=drawn.kept,
    )


def experience_batch(
    experience: Experience, rows: list[int], *, options: PPOOptions, pad_id: int, packing: bool
) -> Batch:
    """The micro-batch of these completions, as `token_batch` packs it, with what PPO's loss takes."""
    names = ["old_logp", "values", "advantages", "returns"]
    if options.kl_in == "loss" and experience.reference_logp is not None:
        names.append("reference_logp")
    return token_batch(experience, rows, names, pad_id=pad_id, packing=packing)
