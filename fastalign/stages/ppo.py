"""Proximal policy optimisation: a causal LM learns from scores of its own completions.

fastalign ppo model=runs/sft/model reward=runs/reward/model train_data=prompts.jsonl output_dir=runs/ppo
fastalign ppo model=runs/sft/model reward=my_rewards.py:score train_data=prompts.jsonl output_dir=runs/ppo \\
    value=shared lora_rank=16
torchrun --nproc-per-node 8 -m fastalign.stages.ppo --config ppo.yaml

A reference keeps the policy near its start, and a value model predicts the scores. A step draws completions
of batch_size prompts (`rollout`, in ppo_rollouts.py) and learns from them in several passes (`ppo_step`).
Both are plain functions that you can call from your own loop.

A rollout is a function of the weights, the seed and the step's number, which key its noise. So checkpoints
lie between steps and hold no rollout: a run that was killed between a rollout and its update draws the same
tokens again.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from fastalign_kernels import value_loss

from ..actor_critic import ActorCritic
from ..data.tokenization import tokenize_prompts
from ..data.tokens import Prompt, Tokenized
from .adapters import load_architecture, record_base
from .batches import Batch, rows_of_step
from .command import run_stage
from .distributed import World
from .estimate import announce
from .files import new_folder
from .loading import check_fit, load_model, load_tokenizer, padding_id, stop_at
from .loop import LossFn, run_steps, start, update
from .optimization import autocast, distribute, make_optimizer
from .packers import pack_rows, without_dropout
from .policy_configs import PPOConfig, PPOOptions, is_function
from .ppo_models import (
    ValueSource,
    end_ids,
    find_value,
    make_reference,
    make_reward,
    make_value,
    micro_batch,
    parts_of,
)
from .ppo_rollouts import Experience, experience_batch, rollout
from .scorers import Classifier, Function, Reward, check_classifier, find_classifier, find_function
from .stage_rows import StageRows, read_rows


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
    rows = len(experience.completions)
    size = rows // options.minibatches
    micro = micro_batch_size or max(size // world.size, 1)
    if size * options.minibatches != rows or size % (micro * world.size):
        raise ValueError(
            f"experience: got {rows} completions, expected a multiple of minibatches x micro_batch_size x "
            f"ranks ({options.minibatches} x {micro} x {world.size})"
        )
    clipped = {
        f"{'val' if name == 'value' else name}/grad_norm": weights for name, weights in base.parts().items()
    }
    loss_fn = ppo_objective(options, float(base.kl_coefficient))
    collate = partial(experience_batch, experience, options=options, pad_id=pad_id, packing=packing)
    found: list[tuple[dict[str, float], int]] = []
    for epoch in range(options.ppo_epochs):
        order = np.random.default_rng((seed, step, epoch)).permutation(rows).tolist()
        for first in range(0, rows, size):
            starts = range(first + world.rank * micro, first + size, world.size * micro)
            batches = [collate(order[start : start + micro]) for start in starts]
            found.append(
                update(
                    world,
                    model,
                    optimizer,
                    batches,
                    loss_fn,
                    precision=precision or torch.autocast(world.device.type, enabled=False),
                    clipped=clipped,
                    max_grad_norm=max_grad_norm,
                    number=len(found),
                    unit=f"update of step {step + 1},",
                    count_items=lambda batch: len(batch["at"]),
                )
            )
    tokens = sum(items for _, items in found)
    metrics = {name: sum(numbers[name] * items for numbers, items in found) / tokens for name in found[0][0]}
    metrics |= {name: sum(numbers[name] for numbers, _ in found) / len(found) for name in clipped}
    metrics["val/ratio_var"] = float(np.var([numbers["val/ratio"] for numbers, _ in found]))
    if not options.rescore:
        metrics |= {
            "mismatch/ratio": found[0][0]["val/ratio"],
            "mismatch/approxkl": found[0][0]["policy/approxkl_avg"],
        }
    if options.target_kl is not None:
        error = min(max(experience.metrics["objective/kl"] / options.target_kl - 1, -0.2), 0.2)
        base.kl_coefficient *= 1 + error * rows / options.kl_horizon
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
        attention = "sdpa" if config.attention == "auto" else config.attention
        tokenizer = load_tokenizer(config.tokenizer or config.model)
        architecture = load_architecture(config.model)
        scorer = find_scorer(config)
        reader = scorer if isinstance(scorer, Classifier) and scorer.reads(tokenizer) else None
        tokenize = partial(
            tokenize_prompts,
            tokenizer=tokenizer,
            max_length=config.max_prompt_length,
            too_long=config.too_long,
        )
        prompts = read_rows(config, tokenizer, tokenize)
        value_source = find_value(config, reader)
        check_prompts(config, tokenizer, prompts.both, (architecture, reader, value_source))
        if isinstance(scorer, Classifier):
            check_classifier(scorer, tokenizer, prompts.both, max_new_tokens=config.max_new_tokens)

        drawn = [[_full(prompt, config.max_new_tokens)] for prompt in prompts.train]
        pad_id = padding_id(tokenizer, architecture)
        announce(
            config,
            world,
            parts_of(config, architecture, scorer, value_source),
            drawn,
            collate=partial(pack_rows, pad_id=pad_id, attention=attention, packing=config.packing),
            micro=micro_batch(config, world),
            cached=(rows_at_once(config, world), max(len(row[0].input_ids) for row in drawn)),
        )
        if config.dry_run:
            return {}
        load = partial(load_model, config, world, attention=attention, packed=config.packing)
        policy = load(architecture, weights=config.model)
        stop_at(policy, prompts.ends)
        reward = make_reward(config, world, scorer, tokenizer, attention)
        model = ActorCritic(policy, make_value(value_source, load), kl_coefficient=config.kl_coef)
        without_dropout(model)
        return train(config, world, model, make_reference(config, policy), reward, tokenizer, prompts)


def find_scorer(config: PPOConfig) -> Function | Classifier:
    """What `reward` names. Raises ValueError if there is no such function or classifier."""
    if is_function(config.reward):
        return find_function(config.reward)
    return find_classifier(config.reward, config.reward_label)


def rows_at_once(config: PPOConfig, world: World) -> int:
    """Rows of one rollout on one device."""
    return config.rollout_batch_size or config.batch_size // world.size


def check_prompts(
    config: PPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    readers: tuple[PretrainedConfig, Classifier | None, ValueSource | None],
) -> None:
    """Raise ValueError if a prompt, or a prompt and its completion, does not fit a model that reads them."""
    policy, classifier, value = readers
    rows = [Tokenized(prompt.input_ids, []) for prompt in prompts]
    rows += [Tokenized(prompt.input_ids + [0] * config.max_new_tokens, []) for prompt in prompts]
    for read in [policy, classifier and classifier.architecture, value and value.architecture]:
        if read:
            check_fit(read, tokenizer, [rows], lower="max_prompt_length or max_new_tokens")


def train(
    config: PPOConfig,
    world: World,
    model: ActorCritic,
    reference: nn.Module | None,
    reward: Reward,
    tokenizer: PreTrainedTokenizerBase,
    prompts: StageRows[Prompt],
) -> dict[str, float]:
    """Train `model` in place, fill output_dir, and return the last line of metrics.jsonl.

    It is a function apart because what DistributedDataParallel holds must be freed before the process
    group.
    """
    wrapped = distribute(config, world, model)
    rates = {} if config.value_learning_rate is None else {"value.": config.value_learning_rate}
    optimizer = make_optimizer(config, model, rates)
    ends = end_ids(model.policy, tokenizer)
    shared: dict[str, Any] = {
        "pad_id": padding_id(tokenizer, model.policy.config),
        "packing": config.packing,
        "precision": autocast(config, world),
        "micro_batch_size": micro_batch(config, world),
        "world": world,
    }
    drawing: dict[str, Any] = shared | {
        "eos_id": ends,
        "reference": reference,
        "rollout_batch_size": rows_at_once(config, world),
    }

    def draw(chosen: Sequence[Prompt], **noise: Any) -> Experience:
        return rollout(model, chosen, reward, config, **drawing, **noise)

    def train_step(step: int) -> tuple[dict[str, float], int]:
        began = time.perf_counter()
        numbers = rows_of_step(step, rows=len(prompts.train), batch_size=config.batch_size, seed=config.seed)
        experience = draw([prompts.train[number] for number in numbers], seed=config.seed, step=step)
        drawn = time.perf_counter()
        order: dict[str, Any] = {"seed": config.seed, "step": step}
        learnt = ppo_step(
            wrapped, optimizer, experience, config, **order, max_grad_norm=config.max_grad_norm, **shared
        )
        metrics = {**experience.metrics, **learnt, "lr": optimizer.param_groups[0]["lr"]}
        metrics |= {"seconds_rollout": drawn - began, "seconds_update": time.perf_counter() - drawn}
        return metrics, config.batch_size

    def evaluate_held_out() -> dict[str, float]:
        metrics = draw(prompts.held_out, seed=config.seed + 1).metrics  # other noise than that of training
        return {
            f"eval/{name}": value
            for name, value in metrics.items()
            if name.startswith(("objective/", "completions/"))
        }

    return run_steps(
        config,
        world,
        model,
        optimizer,
        train_step=train_step,
        evaluate_held_out=evaluate_held_out if prompts.held_out else None,
        save=partial(save_models, model, tokenizer),
        rows=len(prompts.train),
        items_name="episode",
    )


def save_models(model: ActorCritic, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save the policy in folder/model, and a value model of its own in folder/value, with the tokenizer."""
    parts = {"model": model.policy} if model.shared else {"model": model.policy, "value": model.value}
    with ExitStack() as stack:
        unfinished = {name: stack.enter_context(new_folder(folder / name)) for name in parts}
        model.save_pretrained(unfinished["model"], unfinished.get("value"))
        for name, part in parts.items():
            record_base(part, unfinished[name])
            tokenizer.save_pretrained(str(unfinished[name]))


def _full(prompt: Prompt, new_tokens: int) -> Tokenized:
    """A prompt followed by the longest completion."""
    return Tokenized(
        prompt.input_ids + [0] * new_tokens, [False] * len(prompt.input_ids) + [True] * new_tokens
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: `--config FILE key=value …`."""
    run_stage("ppo", run, argv)


if __name__ == "__main__":
    main()
