"""Proximal policy optimisation: a causal LM learns from scores of its own completions.

fastalign ppo model=runs/sft/model reward=runs/reward/model train_data=prompts.jsonl output_dir=runs/ppo
fastalign ppo model=runs/sft/model reward=my_rewards.py:score train_data=prompts.jsonl output_dir=runs/ppo \\
    value=shared lora_rank=16
torchrun --nproc-per-node 8 -m fastalign.stages.ppo --config ppo.yaml

A reference keeps the policy near its start, and a value model predicts the scores. A step draws completions
of batch_size prompts (`rollout`, in ppo_experience.py) and learns from them in several passes (`ppo_step`).
Both are plain functions that you can call from your own loop.

A rollout is a function of the weights, the seed and the step's number, which key its noise. So checkpoints
lie between steps and hold no rollout: a run that was killed between a rollout and its update draws the same
tokens again.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedTokenizerBase

from fastalign_kernels import value_loss

from ..actor_critic import ActorCritic
from .batches import Batch
from .command import run_stage
from .estimate import Part
from .loop import LossFn, start
from .models.loading import load_model, stop_at
from .models.saving import shared_folder, write_model
from .models.sharding import shard, whole_tensor
from .optimization import distribute, make_optimizer
from .packers import without_dropout
from .policy.loop import Passes, item_means, take_passes, train_on_rollouts
from .policy.models import (
    PolicyInputs,
    announce_drawing,
    check_prompts,
    draw_and_learn,
    make_reference,
    make_reward,
    micro_batch,
    parts_of,
    read_inputs,
)
from .policy.ppo_experience import Experience, experience_batch, rollout
from .policy.reward_functions import Reward
from .policy.rollouts import kept_of
from .policy.value_model import find_value, make_value
from .policy_configs import PPOConfig, PPOOptions
from .runs.distributed import World


def ppo_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    experience: Experience,
    options: PPOOptions,
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
    """Learn from a rollout: ppo_epochs passes of `minibatches` optimizer steps each.

    The order is a function of (seed, step).

    The gradients of the policy and of the value model are scaled down to max_grad_norm, each by its own
    norm. With target_kl, `model.kl_coefficient` is adapted at the end. Further arguments are as in
    `rollout`. `model` is an ActorCritic, or DistributedDataParallel's wrapper of it.

    Means over the tokens of all passes and ranks:

        policy/approxkl_avg: (new - old log-probability)² / 2, in nats.
        policy/clipfrac_avg: the share of tokens whose gradient the clip removed.
        policy/entropy_avg: in nats.
        loss/policy_avg, loss/value_avg, loss: the two losses, and what was minimised.
        val/ratio: the ratio of new and old probabilities.
        val/clipfrac_avg: the share of tokens whose value was clipped.

    Further metrics:

        val/ratio_var: the variance of the mean ratio between optimizer steps.
        policy/grad_norm, val/grad_norm: means over the optimizer steps.
        mismatch/ratio, mismatch/approxkl: of the first minibatch, without `rescore`. Its ratios differ from
            1 only as the trainer's log-probabilities differ from the rollout's.

    Raises FloatingPointError if a loss or a gradient is not finite, before the weights change.
    """
    base: Any = model.module if isinstance(model, DistributedDataParallel) else model
    world = world or World(0, 1, base.device)
    clipped = {
        f"{'val' if name == 'value' else name}/grad_norm": weights for name, weights in base.parts().items()
    }
    found = take_passes(
        world,
        model,
        optimizer,
        completed=experience,
        passes=Passes(options.ppo_epochs, options.minibatches, seed, step),
        collate=partial(experience_batch, experience, options=options, pad_id=pad_id, packing=packing),
        loss_fn=ppo_objective(options, float(base.kl_coefficient)),
        clipped=clipped,
        max_grad_norm=max_grad_norm,
        micro_batch_size=micro_batch_size,
        precision=precision,
        count_items=lambda batch: len(batch["at"]),
    )
    metrics = item_means(found)
    metrics |= {name: sum(numbers[name] for numbers, _ in found) / len(found) for name in clipped}
    metrics["val/ratio_var"] = float(np.var([numbers["val/ratio"] for numbers, _ in found]))
    if not options.rescore:
        metrics |= {
            "mismatch/ratio": found[0][0]["val/ratio"],
            "mismatch/approxkl": found[0][0]["policy/approxkl_avg"],
        }
    if options.target_kl is not None:
        error = min(max(experience.metrics["objective/kl"] / options.target_kl - 1, -0.2), 0.2)
        base.kl_coefficient *= 1 + error * len(experience.completions) / options.kl_horizon
    return metrics


def ppo_objective(options: PPOOptions, kl_coefficient: float) -> LossFn:
    """PPO's policy loss plus vf_coef times the value loss, and the metrics of `ppo_step`."""
    fixed: dict[str, Any] = {
        "clip": options.clip,
        "clip_high": options.clip_high,
        "dual_clip": options.dual_clip,
    }
    fixed |= {"entropy_coefficient": options.entropy_coef}
    in_loss = options.kl_in == "loss" and kl_coefficient > 0
    fixed |= {"kl_coefficient": kl_coefficient, "kl_estimator": options.estimator} if in_loss else {}

    def loss_fn(model: nn.Module, batch: Batch, items: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        names: tuple[str, ...] = (
            ("old_logp", "advantages", "reference_logp") if in_loss else ("old_logp", "advantages")
        )
        terms = {**fixed, **{name: batch[name] for name in names}, "normalizer": items}
        terms["kept"] = kept_of(batch)
        policy, values = model(batch["arguments"], batch["at"], temperature=options.temperature, ppo=terms)
        inside = torch.ones_like(batch["at"], dtype=torch.bool)
        value = value_loss(
            values, batch["values"], batch["returns"], inside, clip=options.value_clip, normalizer=items
        )
        means = {
            "policy/approxkl_avg": policy.approx_kl,
            "policy/clipfrac_avg": policy.clip_fraction,
            "policy/entropy_avg": policy.entropy,
            "loss/policy_avg": policy.policy_loss,
            "val/clipfrac_avg": value.clip_fraction,
            "val/ratio": policy.mean_ratio,
        }
        shares = {name: mean.double() * len(batch["at"]) / items for name, mean in means.items()}
        return policy.loss + options.vf_coef * value.loss, shares | {"loss/value_avg": value.loss}

    return loss_fn


def run(config: PPOConfig) -> dict[str, float]:
    """Align as configured; return the last line of metrics.jsonl, or nothing for a dry run.

    Leaves the policy in output_dir/model and its value model, if it is not shared, in output_dir/value.
    Raises ValueError for data, a tokenizer, a reward or a model that cannot be used, before a model is
    loaded.
    """
    with start(config) as world:
        micro_batch(config, world)
        inputs = read_inputs(config, world)
        value_source = find_value(config, inputs.reader, inputs.tokenizer)
        parts = parts_of(config, inputs.architecture, inputs.scorer)
        if value_source is not None:
            check_prompts(config, inputs, [value_source.architecture])
            parts.insert(1, Part("value model", value_source.architecture, "SEQ_CLS"))
        announce_drawing(config, world, inputs, parts)
        if config.dry_run:
            return {}
        load = partial(load_model, config, world, attention=inputs.attention, packed=config.packing)
        policy = load(inputs.architecture, weights=config.model)
        stop_at(policy, inputs.prompts.ends)
        reward = make_reward(config, world, inputs)
        model = ActorCritic(policy, make_value(value_source, load), kl_coefficient=config.kl_coef)
        without_dropout(model)
        reference = make_reference(config, world, policy)
        # Two models, because a rollout runs each without the other.
        shard(world.sharding, model.policy)
        shard(world.sharding, model.value)
        return train(config, world, model, reference, reward, inputs)


def train(
    config: PPOConfig,
    world: World,
    model: ActorCritic,
    reference: nn.Module | None,
    reward: Reward,
    inputs: PolicyInputs,
) -> dict[str, float]:
    """Train `model` in place, fill output_dir, and return the last line of metrics.jsonl.

    It is a function apart because what DistributedDataParallel holds must be freed before the process
    group.
    """
    wrapped = distribute(config, world, model)
    rates = {} if config.value_learning_rate is None else {"value.": config.value_learning_rate}
    optimizer = make_optimizer(config, model, rates)
    draw, learn = draw_and_learn(
        config,
        world,
        model.policy,
        inputs,
        reference,
        rollout=partial(rollout, model, score=reward, options=config),
        step=partial(ppo_step, wrapped, optimizer, options=config),
    )
    save = partial(save_models, world, model, inputs.tokenizer)
    return train_on_rollouts(
        config, world, model, optimizer, inputs.prompts, draw=draw, learn=learn, save=save
    )


def save_models(world: World, model: ActorCritic, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save the policy in folder/model, and a value model of its own in folder/value, with the tokenizer.

    The head of a shared value model goes into a file beside the policy. All ranks call it.
    """
    parts = {"model": model.policy} if model.shared else {"model": model.policy, "value": model.value}
    with ExitStack() as stack:
        unfinished = {name: stack.enter_context(shared_folder(world, folder / name)) for name in parts}
        for name, part in parts.items():
            write_model(world, part, tokenizer, unfinished[name])
        if model.shared:
            head = {name: whole_tensor(tensor) for name, tensor in model.value.state_dict().items()}
            if world.main:
                model.save_value_head(unfinished["model"], head)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: `--config FILE key=value …`."""
    run_stage("ppo", run, argv)


if __name__ == "__main__":
    main()
