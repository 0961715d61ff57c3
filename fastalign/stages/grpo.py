"""Group relative policy optimisation: a causal LM learns from scores of several completions of each prompt.

fastalign grpo model=runs/sft/model reward=my_rewards.py:score train_data=prompts.jsonl output_dir=runs/grpo
fastalign grpo model=runs/sft/model reward=runs/reward/model train_data=prompts.jsonl output_dir=runs/grpo \\
    loss_type=grpo kl_coef=0.04 inner_epochs=2 lora_rank=16
torchrun --nproc-per-node 8 -m fastalign.stages.grpo --config grpo.yaml

A completion's advantage is its score compared with those of its group, the completions of one prompt. So
there is no value model, and without a KL divergence (kl_coef=0) no reference. A step draws group_size
completions of batch_size / group_size prompts (`grpo_rollout`) and learns from them in inner_epochs passes
(`grpo_step`). Both are plain functions that you can call from your own loop.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastalign_kernels.sampling_kept import KeptIds

from ..data.sequence_batches import at_places
from ..data.tokens import Prompt
from .batches import Batch
from .command import run_stage
from .loop import LossFn, start
from .models.loading import load_model, stop_at
from .models.saving import save_model
from .models.sharding import shard
from .optimization import distribute, make_optimizer, trained_weights
from .packers import without_dropout
from .policy.loop import Passes, item_means, take_passes, train_on_rollouts
from .policy.models import (
    PolicyInputs,
    announce_drawing,
    draw_and_learn,
    make_reference,
    make_reward,
    micro_batch,
    parts_of,
    read_inputs,
)
from .policy.reward_functions import Reward
from .policy.rollouts import Score, draw_completions, estimate_kl, kept_of, token_batch
from .policy_configs import GRPOConfig, GRPOOptions
from .runs.distributed import World

EPSILON = 1e-4  # added to the standard deviation, as in TRL


class GroupExperience(NamedTuple):
    """The completions of a step's groups, of all ranks, with what `grpo_step` learns from them.

    B completions of at most R tokens, those of a group one after another. `mask`: bool [B, R], all tokens;
    `learnt`: those that the loss counts. Of its shape, in nats: `old_logp`, `reference_logp` (None without a
    reference); `advantages`. `scores`: [B]. `metrics`: those of the rollout. `kept`: as in `Drawn`.
    """

    prompts: list[list[int]]
    completions: Sequence[list[int]]
    mask: Tensor
    learnt: Tensor
    old_logp: Tensor
    reference_logp: Tensor | None
    advantages: Tensor
    scores: Tensor
    metrics: dict[str, float]
    kept: Sequence[KeptIds] | None = None


def group_advantages(rewards: Tensor, group_size: int, scale: str) -> Tensor:
    """Each reward minus its group's mean, over the standard deviation of the group, of the batch, or 1.

    rewards: [groups x group_size], those of a group one after another. scale: "group", "batch" or "none".
    """
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    if scale == "none":
        return centred.flatten()
    deviation = groups.std(1, keepdim=True) if scale == "group" else rewards.std()
    return (centred / (deviation + EPSILON)).flatten()


@torch.no_grad()
def grpo_rollout(
    policy: Any, prompts: Sequence[Prompt], score: Score, options: GRPOOptions, **given: Any
) -> GroupExperience:
    """Complete each prompt group_size times, score the completions, and compare those of a group.

    `given` are the keywords of `draw_completions`: eos_id and pad_id, and if wanted reference, seed, step,
    micro_batch_size, rollout_batch_size, packing, precision and world.

    Metrics beside those that `draw_completions` lists:

        objective/non_score_reward: with kl_in=reward, what the KL divergence adds to a reward; mean.
        groups/std: the standard deviation of a group's rewards; mean.
        groups/equal: the share of groups whose rewards are equal, from which nothing is learnt.

    Raises FloatingPointError for logits that are not finite.
    """
    repeated = [prompt for prompt in prompts for _ in range(options.group_size)]
    drawn = draw_completions(policy, repeated, score, options, **given)
    rewards, metrics = drawn.scores, drawn.metrics(options)
    if options.kl_in == "reward" and drawn.reference_logp is not None:
        kl = (estimate_kl(drawn.log_ratio(), options.estimator) * drawn.mask).sum(1)
        rewards = rewards - options.kl_coef * kl
        metrics["objective/non_score_reward"] = -options.kl_coef * kl.mean()
    groups = rewards.view(-1, options.group_size)
    metrics["groups/std"] = groups.std(1).mean()
    metrics["groups/equal"] = (groups.amax(1) == groups.amin(1)).double().mean()
    advantages = group_advantages(rewards, options.group_size, options.scale_rewards)
    weight = drawn.importance(options.importance_cap)
    each_token = advantages[:, None].to(drawn.old_logp.dtype) * drawn.mask
    whole = drawn.ended | (not options.mask_truncated)
    return GroupExperience(
        prompts=drawn.prompts,
        completions=drawn.completions,
        mask=drawn.mask,
        learnt=drawn.mask & whole[:, None],
        old_logp=drawn.old_logp,
        reference_logp=drawn.reference_logp,
        advantages=each_token if weight is None else each_token * weight,
        scores=drawn.scores,
        metrics=dict(zip(metrics, torch.stack([x.double() for x in metrics.values()]).tolist(), strict=True)),
        kept=drawn.kept,
    )


def grpo_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    experience: GroupExperience,
    options: GRPOOptions,
    *,
    pad_id: int,
    seed: int = 0,
    step: int = 0,
    max_grad_norm: float | None = 1.0,
    micro_batch_size: int | None = None,
    packing: bool = True,
    precision: torch.autocast | None = None,
    world: World | None = None,
) -> dict[str, float]:
    """Learn from a rollout: inner_epochs passes of `minibatches` optimizer steps each.

    The order is a function of (seed, step). Gradients are scaled down to max_grad_norm. Further arguments are
    as in `draw_completions`. `model` is the policy, or DistributedDataParallel's wrapper of it.

    Means over the counted tokens of all passes and ranks:

        policy/approxkl_avg: (new - old log-probability)² / 2, in nats.
        policy/clipfrac_avg: the share of tokens whose gradient the clip removed.
        policy/entropy_avg: in nats.
        policy/kl_avg: with kl_in=loss, the estimate of the KL divergence from the reference, in nats.
        policy/ratio_avg: the ratio of new and old probabilities.
        loss: what was minimised.

    Further metrics:

        grad_norm: mean over the optimizer steps.
        mismatch/ratio, mismatch/approxkl: of the first minibatch, without `rescore`. Its ratios differ from
            1 only as the trainer's log-probabilities differ from the rollout's.

    Raises FloatingPointError if a loss or a gradient is not finite, before the weights change.
    """
    rows = len(experience.completions)
    names = ["old_logp", "advantages", "learnt"]
    in_loss = options.kl_in == "loss" and options.kl_coef > 0
    found = take_passes(
        world or World(0, 1, experience.mask.device),
        model,
        optimizer,
        completed=experience,
        passes=Passes(options.inner_epochs, options.minibatches, seed, step),
        collate=partial(
            token_batch,
            experience,
            names=[*names, "reference_logp"] if in_loss else names,
            pad_id=pad_id,
            packing=packing,
        ),
        loss_fn=grpo_objective(options, rows // options.minibatches),
        clipped={"grad_norm": trained_weights(model)},
        max_grad_norm=max_grad_norm,
        micro_batch_size=micro_batch_size,
        precision=precision,
        count_items=lambda batch: int(batch["learnt"].sum()),
    )
    metrics = item_means(found)
    metrics["grad_norm"] = sum(numbers["grad_norm"] for numbers, _ in found) / len(found)
    if not options.rescore:
        first, _ = found[0]
        metrics |= {
            "mismatch/ratio": first["policy/ratio_avg"],
            "mismatch/approxkl": first["policy/approxkl_avg"],
        }
    return metrics


def grpo_objective(options: GRPOOptions, sequences: int) -> LossFn:
    """The clipped loss over the counted tokens of an optimizer step, and the metrics of `grpo_step`.

    sequences: completions in the step, over micro-batches and ranks. With "grpo" the loss is the mean of a
    completion's tokens, averaged over the completions; with "dapo" the mean of all tokens; with "dr_grpo" the
    sum over tokens divided by sequences x max_new_tokens.
    """
    in_loss = options.kl_in == "loss" and options.kl_coef > 0
    fixed: dict[str, Any] = {
        "clip": options.clip,
        "clip_high": options.clip_high,
        "dual_clip": options.dual_clip,
        "entropy_coefficient": options.entropy_coef,
        **({"kl_coefficient": options.kl_coef, "kl_estimator": options.estimator} if in_loss else {}),
    }

    def loss_fn(model: nn.Module, batch: Batch, items: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        average: dict[str, Any] = {
            "grpo": {
                "aggregation": "sequence_mean",
                "normalizer": float(sequences),
                "cu_seqlens": batch["starts"],
            },
            "dapo": {"aggregation": "token_mean", "normalizer": items.clamp(min=1)},
            "dr_grpo": {"aggregation": "sum", "normalizer": float(sequences * options.max_new_tokens)},
        }[options.loss_type]
        shape = batch["arguments"]["labels"].shape
        shape = shape if options.loss_type != "grpo" else torch.Size([shape.numel()])
        names = {"old_logp": "old_logp", "advantages": "advantages", "mask": "learnt"}
        names |= {"reference_logp": "reference_logp"} if in_loss else {}
        tokens = {name: at_places(batch[field], batch["at"], shape) for name, field in names.items()}
        policy = model(
            **batch["arguments"],
            use_cache=False,
            temperature=options.temperature,
            ppo={**fixed, **average, **tokens, "kept": kept_of(batch)},
        ).policy
        means = {
            "policy/approxkl_avg": policy.approx_kl,
            "policy/clipfrac_avg": policy.clip_fraction,
            "policy/entropy_avg": policy.entropy,
            "policy/ratio_avg": policy.mean_ratio,
        }
        means |= {"policy/kl_avg": policy.kl} if in_loss else {}
        counted = batch["learnt"].sum()
        share = counted.double() / items.clamp(min=1)  # means over no token are NaN
        shares = {name: torch.where(counted > 0, mean * share, 0.0) for name, mean in means.items()}
        return policy.loss, shares

    return loss_fn


def run(config: GRPOConfig) -> dict[str, float]:
    """Align as configured; return the last line of metrics.jsonl, or nothing for a dry run.

    Raises ValueError for data, a tokenizer, a reward or a model that cannot be used, before a model is
    loaded.
    """
    with start(config) as world:
        micro_batch(config, world)
        inputs = read_inputs(config, world)
        parts = parts_of(config, inputs.architecture, inputs.scorer)
        announce_drawing(config, world, inputs, parts, copies=config.group_size)
        if config.dry_run:
            return {}
        policy = load_model(
            config,
            world,
            inputs.architecture,
            weights=config.model,
            attention=inputs.attention,
            packed=config.packing,
        )
        stop_at(policy, inputs.prompts.ends)
        without_dropout(policy)
        reward = make_reward(config, world, inputs)
        reference = make_reference(config, world, policy)
        shard(world.sharding, policy)
        return train(config, world, policy, reference, reward, inputs)


def train(
    config: GRPOConfig,
    world: World,
    policy: Any,
    reference: nn.Module | None,
    reward: Reward,
    inputs: PolicyInputs,
) -> dict[str, float]:
    """Train the policy in place, fill output_dir, and return the last line of metrics.jsonl.

    It is a function apart because what DistributedDataParallel holds must be freed before the process
    group.
    """
    wrapped = distribute(config, world, policy)
    optimizer = make_optimizer(config, policy)
    draw, learn = draw_and_learn(
        config,
        world,
        policy,
        inputs,
        reference,
        rollout=partial(grpo_rollout, policy, score=reward, options=config),
        step=partial(grpo_step, wrapped, optimizer, options=config),
    )
    return train_on_rollouts(
        config,
        world,
        policy,
        optimizer,
        inputs.prompts,
        draw=draw,
        learn=learn,
        save=partial(save_model, world, policy, inputs.tokenizer),
        copies=config.group_size,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: `--config FILE key=value …`."""
    run_stage("grpo", run, argv)


if __name__ == "__main__":
    main()
