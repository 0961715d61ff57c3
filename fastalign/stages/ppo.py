"""Proximal policy optimisation: a causal LM learns from scores of its own completions, near a reference, with a value model.

fastalign ppo model=runs/sft/model reward=runs/reward/model train_data=prompts.jsonl output_dir=runs/ppo max_new_tokens=64
fastalign ppo model=runs/sft/model reward=my_rewards.py:score train_data=prompts.jsonl output_dir=runs/ppo value=shared lora_rank=16
torchrun --nproc-per-node 8 -m fastalign.stages.ppo --config ppo.yaml

A step draws completions of batch_size prompts (`rollout`) and learns from them in several passes (`ppo_step`); both are plain
functions for a loop of one's own. The old log-probabilities are those that the rollout returned, of the tempered policy before
top-k, top-p and min-p: the one that the update scores, so that ratios begin at 1 (docs/rollout_logprobs.md).

A rollout is a function of the weights, the seed and the step's number, as its noise is keyed by them. So checkpoints lie between
steps and hold none: a run that was killed between a rollout and its update draws the same tokens again.
"""

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
import torch.distributed as dist
from peft import PeftModel
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, PreTrainedTokenizerBase

from fastalign_kernels import gae, masked_whiten, value_loss

from ..actor_critic import ActorCritic
from ..data import Prompt, Tokenized, load_rows, tokenize_prompts
from ..preferences import pack_sequences
from ..rollout import generate
from .build import check_fit, load_model, load_tokenizer, padding_id
from .config import CONFIG, TrainConfig, parse
from .loop import Batch, LossFn, autocast, distribute, make_optimizer, rows_of_step, run_steps, start, update
from .preference import without_dropout
from .reward import zero_head
from .rewards import Classifier, Function, Reward, by_function, find_classifier, find_function, is_function, load_classifier
from .world import World


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class PPOOptions:
    """How completions are drawn and learnt from: what `rollout` and `ppo_step` take."""

    max_new_tokens: PositiveInt = 64
    """Longest completion in tokens."""
    temperature: PositiveFloat = 1.0
    """Divides the logits, in the rollout and in all log-probabilities."""
    top_k: int = Field(default=0, ge=0)
    """Draw among the so many likeliest tokens; 0: among all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw among the likeliest tokens that hold this probability."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Draw among tokens at least this fraction as likely as the likeliest."""
    rescore: bool = False
    """Take the old log-probabilities from a pass of the trainer over the rollout; false: as the rollout returned them."""
    importance_cap: float | None = Field(default=None, gt=0)
    """Weigh each token's policy loss by the ratio of trainer's and rollout's probabilities, at most this (needs rescore)."""

    missing_eos_penalty: float | None = Field(default=None, gt=0)
    """Subtracted from the score of a completion that did not end within max_new_tokens."""
    kl_coef: NonNegativeFloat = 0.05
    """Weight of the KL divergence from the reference, nats a token."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the KL divergence counts: in each token's reward, or in the policy's loss."""
    kl_estimator: Literal["auto", "k1", "k2", "k3"] = "auto"
    """With d the log-ratio of policy and reference: k1 is d, k2 d²/2, k3 exp(-d) - 1 + d. auto: k1 in the reward, k3 in the loss."""
    target_kl: float | None = Field(default=None, gt=0)
    """Adapt kl_coef so that the KL divergence comes near this (nats a completion). Default: kl_coef is fixed."""
    kl_horizon: PositiveInt = 10_000
    """Completions after which an adaptive kl_coef has changed by a factor of about 1.2 at most."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount a token."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """GAE's lambda: 1 takes the rewards to come, 0 the value of the next token."""
    whiten_rewards: bool = False
    """Scale the rewards of all tokens of a step to variance 1."""
    whiten_advantages: bool = True
    """Shift and scale the advantages of all tokens of a step, on all ranks, to mean 0 and variance 1."""

    ppo_epochs: PositiveInt = 4
    """Passes over the completions of a step."""
    minibatches: PositiveInt = 1
    """Optimizer steps in a pass."""
    clip: PositiveFloat = 0.2
    """The ratio of new and old probabilities is held within 1 - clip and 1 + clip."""
    clip_high: float | None = Field(default=None, gt=0)
    """Another bound above, 1 + clip_high."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Bounds the loss of a token with a negative advantage by this times its advantage."""
    value_clip: float | None = Field(default=0.2, gt=0)
    """A value counts as moved at most this far from the old one; null: no bound."""
    vf_coef: NonNegativeFloat = 0.1
    """Weight of the value loss."""
    entropy_coef: float = 0.0
    """Weight of the policy's entropy (nats), which is subtracted from the loss."""

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        if self.importance_cap is not None and not self.rescore:
            raise ValueError(f"importance_cap ({self.importance_cap}) needs rescore=true, which gives the trainer's log-probabilities")
        if self.target_kl is not None and not self.kl_coef:
            raise ValueError(f"target_kl ({self.target_kl}) needs a kl_coef above 0 to begin with")
        return self

    @property
    def estimator(self) -> str:
        """kl_estimator, with auto decided."""
        return self.kl_estimator if self.kl_estimator != "auto" else "k1" if self.kl_in == "reward" else "k3"


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class PPOConfig(PPOOptions, TrainConfig):
    """Align a causal LM with the scores of its completions of rows of `prompt`."""

    model: str
    """Folder or name of the model."""
    reward: str
    """What scores completions: folder or name of a sequence classifier, or a Python function, "module:function" or
    "file.py:function", that is given prompts and completions (and columns that it names) and returns a score for each."""
    reward_label: int | None = Field(default=None, ge=0)
    """Which label's logit is the score, where the classifier has several."""
    value: Literal["own", "shared"] = "own"
    """A value model of its own, or a linear layer on the hidden states of the policy."""
    value_model: str | None = None
    """Folder or name that a value model of its own starts from. Default: the reward model, where it is a classifier with one
    label that reads the policy's tokens, else the policy, with values of zero."""
    value_learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of the value model or layer. Default: learning_rate."""
    reference: Literal["auto", "copy", "adapters_off", "none"] = "auto"
    """What the policy is held near: a frozen copy of it as it was, the model without its LoRA adapters, or nothing (needs kl_coef=0).
    auto: adapters_off with LoRA, else copy."""
    max_prompt_length: PositiveInt = 512
    """Longest prompt in tokens; rows with longer ones are left out."""
    packing: bool = True
    """Pack sequences that share a forward pass into rows as long as the longest, blind to each other."""
    batch_size: PositiveInt = 64
    """Prompts in one step, over all devices; each is completed once."""
    micro_batch_size: int | None = Field(default=None, gt=0)
    """Sequences in one forward pass on one device. Default: batch_size / minibatches / devices, that is, no accumulation."""
    rollout_batch_size: int | None = Field(default=None, gt=0)
    """Completions drawn at once on one device. Default: batch_size / devices."""
    learning_rate: PositiveFloat = 3e-6
    """Peak learning rate of AdamW."""

    @model_validator(mode="after")
    def _check_stage(self) -> Self:
        if self.batch_size % self.minibatches:
            raise ValueError(f"batch_size ({self.batch_size}) must be a multiple of minibatches ({self.minibatches})")
        if self.reference == "adapters_off" and not self.lora_rank:
            raise ValueError("reference: adapters_off needs adapters (lora_rank > 0); allowed without: auto, copy, none")
        if self.reference == "none" and self.kl_coef:
            raise ValueError(f"reference: none needs kl_coef=0, not {self.kl_coef}")
        if self.value_model is not None and self.value == "shared":
            raise ValueError(f"value_model ({self.value_model!r}) needs value=own, not shared")
        if self.reward_label is not None and is_function(self.reward):
            raise ValueError(f"reward_label ({self.reward_label}) needs a classifier, and reward is the function {self.reward!r}")
        if self.lora_dropout:
            raise ValueError(f"lora_dropout: {self.lora_dropout} seen, and PPO compares the policy with its rollout; allowed: 0")
        if self.attention == "flash_attention_2":
            raise ValueError("attention: flash_attention_2 reads no static cache, which rollouts have; allowed: auto, sdpa, eager")
        return self


class Experience(NamedTuple):
    """The completions of a step's prompts, those of all ranks on every rank, with what `ppo_step` learns from them.

    B completions of at most R tokens: `mask` bool [B, R], and in its shape, nats or units of the reward: `old_logp`,
    `reference_logp` (None without a reference), `values`, `advantages`, `returns`; `scores` [B]. `metrics`: of the rollout.
    """

    prompts: list[list[int]]
    completions: list[list[int]]
    mask: Tensor
    old_logp: Tensor
    reference_logp: Tensor | None
    values: Tensor
    advantages: Tensor
    returns: Tensor
    scores: Tensor
    metrics: dict[str, float]


@torch.no_grad()
def rollout(
    model: ActorCritic,
    prompts: Sequence[Prompt],
    score: Callable[[Sequence[Prompt], Sequence[list[int]]], Tensor | Sequence[float]],
    options: PPOOptions,
    *,
    eos_id: int | Sequence[int],
    pad_id: int,
    reference: nn.Module | None = None,
    seed: int = 0,
    step: int = 0,
    micro_batch_size: int | None = None,
    rollout_batch_size: int | None = None,
    packing: bool = True,
    precision: torch.autocast | None = None,
    world: World | None = None,
) -> Experience:
    """Complete the prompts, score the completions, and estimate the advantage of each of their tokens.

    Args:
        prompts: of all ranks, which draw a block each. `fastalign.data.Prompt(ids)` makes one of tokens.
        score: from this rank's prompts and completions (tokens, EOS among them) to a score for each, [B].
        eos_id: ids that end a completion.
        reference: a causal LM with a fused head, or `model.policy` itself, which then runs without its adapters.
        seed, step: key the noise; with the same weights, the same tokens.
        micro_batch_size, rollout_batch_size: sequences in a forward pass, and in a batch of the rollout. Default: all.
        packing: several sequences to a row, as in `fastalign.preferences.pack_sequences`.
        precision: of the forward passes.
        world: the ranks; None: this process alone.

    The metrics are means over the completions: objective/kl (nats, Σ over tokens of the log-ratio of policy and reference),
    objective/entropy (nats, -Σ log-probability), objective/scores, objective/non_score_reward (the KL divergence's share of the
    rewards) and objective/rlhf_reward, their sum; completions/mean_length in tokens; val/num_eos_tokens, how many ended;
    val/explained_variance of the returns by the old values. Raises FloatingPointError for logits that are not finite.
    """
    world = world or World(0, 1, model.device)
    first, end = (len(prompts) * rank // world.size for rank in (world.rank, world.rank + 1))
    if len(prompts) < world.size:
        raise ValueError(f"prompts: {len(prompts)} seen, at least one for each of the {world.size} ranks wanted")
    own = prompts[first:end]
    with precision or nullcontext():
        draw = partial(_draw, model, options=options, eos_id=eos_id, pad_id=pad_id, seed=seed)
        size = rollout_batch_size or len(own)
        parts = [draw(own[at : at + size], step * len(prompts) + first + at) for at in range(0, len(own), size)]
        completions = [ids for part, _ in parts for ids in part]
        lengths = torch.tensor([len(ids) for ids in completions])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        drawn = _in_rows(torch.cat([logp for _, logp in parts]), mask.to(model.device))
        scores = torch.as_tensor(score(own, completions), dtype=torch.float64)
        if scores.shape != (len(own),):
            raise ValueError(f"score: returned {list(scores.shape)}, [{len(own)}] wanted, a score for each completion")

        if not scores.isfinite().all():
            raise FloatingPointError(f"score: {int((~scores.isfinite()).sum())} of {len(own)} completions got no finite score")

        sequences = [_sequence(prompt.input_ids, ids) for prompt, ids in zip(own, completions, strict=True)]
        passes = partial(_passes, world=world, sequences=sequences, mask=mask, rows=micro_batch_size, pad_id=pad_id, packing=packing)
        values = passes(model.values)
        reference_logp = None if reference is None else passes(partial(_logps, model, reference, options.temperature))
        rescored = passes(partial(_logps, model, None, options.temperature)) if options.rescore else None

    named = {"mask": mask, "drawn": drawn, "scores": scores, "values": values, "reference": reference_logp, "rescored": rescored}
    whole = _gather(world, {name: tensor for name, tensor in named.items() if tensor is not None})
    every = [ids for part in _gather_lists(world, completions) for ids in part]
    return _estimate(model, options, [prompt.input_ids for prompt in prompts], every, whole, eos_id)


def _draw(
    model: ActorCritic,
    prompts: Sequence[Prompt],
    first_id: int,
    *,
    options: PPOOptions,
    eos_id: int | Sequence[int],
    pad_id: int,
    seed: int,
) -> tuple[list[list[int]], Tensor]:
    """Completions in tokens, and the log-probabilities of their tokens under the tempered policy, [tokens] one after another."""
    width = max(len(prompt.input_ids) for prompt in prompts)
    padding = [width - len(prompt.input_ids) for prompt in prompts]
    ids = [[pad_id] * left + prompt.input_ids for left, prompt in zip(padding, prompts, strict=True)]
    mask = [[0] * left + [1] * (width - left) for left in padding]
    drawn = generate(
        model.policy,
        torch.tensor(ids, device=model.device),
        torch.tensor(mask, device=model.device),
        max_new_tokens=options.max_new_tokens,
        seed=seed,
        eos_id=eos_id,
        pad_id=pad_id,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        sequence_ids=torch.arange(first_id, first_id + len(prompts), device=model.device),
    )
    completions = [row[:length] for row, length in zip(drawn.tokens.tolist(), drawn.lengths.tolist(), strict=True)]
    return completions, (drawn.logp + drawn.log_kept)[drawn.mask]


def _sequence(prompt: list[int], completion: list[int]) -> Tokenized:
    return Tokenized(prompt + completion, [False] * len(prompt) + [True] * len(completion))


def _pack(sequences: Sequence[Tokenized], *, pad_id: int, packing: bool) -> Batch:
    """pack_sequences' arguments, and `at`: the place before each scored token, among all tokens, int64 [N], sequence by sequence."""
    packed = pack_sequences(sequences, pad_id=pad_id, packing=packing)
    begins = packed["starts"][packed["places"]].tolist()
    spans = [(begin + s.trained.index(True) - 1, begin + len(s.trained) - 1) for begin, s in zip(begins, sequences, strict=True)]
    return {"arguments": packed["arguments"], "at": torch.cat([torch.arange(*span) for span in spans])}


def _passes(
    score: Callable[[Any, Tensor], Tensor],
    *,
    world: World,
    sequences: Sequence[Tokenized],
    mask: Tensor,
    rows: int | None,
    pad_id: int,
    packing: bool,
) -> Tensor:
    """What `score` gives each scored token, [B, R], some rows at a time."""
    rows = rows or len(sequences)
    found = []
    for first in range(0, len(sequences), rows):
        batch = world.place(_pack(sequences[first : first + rows], pad_id=pad_id, packing=packing))
        found.append(score(batch["arguments"], batch["at"]))
    return _in_rows(torch.cat(found), mask.to(world.device))


def _logps(model: ActorCritic, reference: nn.Module | None, temperature: float, arguments: Any, at: Tensor) -> Tensor:
    """Log-probabilities of the scored tokens under the tempered reference, None: the policy, [N]."""
    policy: Any = model.policy
    with policy.disable_adapter() if reference is model.policy else nullcontext():
        scorer = policy if reference is None else reference
        logp: Tensor = scorer(**arguments, use_cache=False, token_stats=True, temperature=temperature).logp
    return logp.flatten()[at]


def _in_rows(values: Tensor, mask: Tensor) -> Tensor:
    return values.new_zeros(mask.shape).masked_scatter_(mask, values)


def _gather(world: World, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows of all ranks, padded to one length with 0, on this rank's device."""
    if world.size == 1:
        return {name: tensor.to(world.device) for name, tensor in tensors.items()}
    parts = _gather_lists(world, {name: tensor.cpu() for name, tensor in tensors.items()})
    longest = max(part["mask"].shape[1] for part in parts)

    def padded(tensor: Tensor) -> Tensor:
        return nn.functional.pad(tensor, (0, longest - tensor.shape[1])) if tensor.dim() == 2 else tensor

    return {name: torch.cat([padded(part[name]) for part in parts]).to(world.device) for name in tensors}


def _gather_lists(world: World, own: Any) -> list[Any]:
    parts: list[Any] = [own]
    if world.size > 1:
        parts = [None] * world.size
        dist.all_gather_object(parts, own)
    return parts


def _estimate(
    model: ActorCritic,
    options: PPOOptions,
    prompts: list[list[int]],
    completions: list[list[int]],
    whole: dict[str, Tensor],
    eos_id: int | Sequence[int],
) -> Experience:
    """Rewards, advantages and metrics of the completions of all ranks."""
    mask, drawn, scores, values, reference = (whole.get(name) for name in ("mask", "drawn", "scores", "values", "reference"))
    assert mask is not None and drawn is not None and scores is not None and values is not None
    old = whole.get("rescored", drawn)
    ends = {eos_id} if isinstance(eos_id, int) else set(eos_id)
    ended = torch.tensor([ids[-1] in ends for ids in completions], device=mask.device)
    if options.missing_eos_penalty is not None:
        scores = scores - options.missing_eos_penalty * ~ended
    log_ratio = torch.zeros_like(old) if reference is None else old - reference
    kl_reward = torch.zeros_like(old)
    if options.kl_in == "reward":
        kl_reward = -float(model.kl_coefficient) * _kl(log_ratio, options.estimator) * mask
    rewards = kl_reward.scatter_add(1, mask.sum(1, keepdim=True) - 1, scores[:, None].to(old.dtype))
    if options.whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(rewards, values, mask, gamma=options.gamma, lam=options.lam)
    spread = returns[mask].double().var(correction=0)
    unexplained = (returns - values)[mask].double().var(correction=0)
    if options.whiten_advantages:
        advantages = masked_whiten(advantages, mask)
    metrics = {
        "objective/kl": log_ratio.sum(1).mean(),
        "objective/entropy": -old.sum(1).mean(),
        "objective/non_score_reward": kl_reward.sum(1).mean(),
        "objective/rlhf_reward": kl_reward.sum(1).mean() + scores.mean(),
        "objective/scores": scores.mean(),
        "completions/mean_length": mask.sum(1).double().mean(),
        "val/num_eos_tokens": ended.sum(),
        "val/explained_variance": torch.where(spread > 0, 1 - unexplained / spread, 0.0),
        "kl_coef": model.kl_coefficient,
    }
    if "rescored" in whole:
        difference = (old - drawn)[mask]
        metrics |= {"mismatch/ratio": difference.exp().mean(), "mismatch/approxkl": (difference**2).mean() / 2}
        if options.importance_cap is not None:
            advantages = advantages * (old - drawn).exp().clamp(max=options.importance_cap)
    if reference is None:
        del metrics["objective/kl"]
    numbers = dict(zip(metrics, torch.stack([value.double() for value in metrics.values()]).tolist(), strict=True))
    return Experience(prompts, completions, mask, old, reference, values, advantages, returns, scores, numbers)


def _kl(d: Tensor, estimator: str) -> Tensor:
    return {"k1": lambda: d, "k2": lambda: d**2 / 2, "k3": lambda: torch.expm1(-d) + d}[estimator]()


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
    """Learn from a rollout: ppo_epochs passes of as many optimizer steps as there are minibatches, in an order of (seed, step).

    The gradients of the policy and of the value model are scaled down to max_grad_norm, each by its own norm. With target_kl,
    `model.kl_coefficient` is adapted at the end. Other arguments are `rollout`'s.

    The metrics are means over the tokens of all passes and ranks: policy/approxkl_avg, (new - old log-probability)² / 2 in nats;
    policy/clipfrac_avg, the share of tokens whose gradient the clip removed; policy/entropy_avg in nats; loss/policy_avg,
    loss/value_avg and loss, what was minimised; val/ratio; val/clipfrac_avg, the share of tokens whose value was clipped. And
    val/ratio_var, the variance of the mean ratio between optimizer steps; policy/grad_norm and val/grad_norm, means over
    these; without `rescore` mismatch/ratio and mismatch/approxkl, of the first minibatch, whose ratios differ from 1 only as
    the trainer's log-probabilities differ from the rollout's.

    `model`: an ActorCritic, or DistributedDataParallel's wrapper of it. Raises FloatingPointError where a loss or a gradient is
    not finite, before it reaches the weights.
    """
    base: Any = model.module if isinstance(model, DistributedDataParallel) else model
    world = world or World(0, 1, base.device)
    rows = len(experience.completions)
    size = rows // options.minibatches
    micro = micro_batch_size or max(size // world.size, 1)
    if size * options.minibatches != rows or size % (micro * world.size):
        raise ValueError(
            f"{rows} completions: a multiple of minibatches x micro_batch_size x ranks "
            f"({options.minibatches} x {micro} x {world.size}) wanted"
        )
    clipped = {f"{'val' if name == 'value' else name}/grad_norm": weights for name, weights in base.parts().items()}
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
        metrics |= {"mismatch/ratio": found[0][0]["val/ratio"], "mismatch/approxkl": found[0][0]["policy/approxkl_avg"]}
    if options.target_kl is not None:
        error = min(max(experience.metrics["objective/kl"] / options.target_kl - 1, -0.2), 0.2)
        base.kl_coefficient *= 1 + error * rows / options.kl_horizon
    return metrics


def experience_batch(experience: Experience, rows: list[int], *, options: PPOOptions, pad_id: int, packing: bool) -> Batch:
    """The micro-batch of these completions: what `_pack` gives, and the numbers of their tokens, [N]."""
    sequences = [_sequence(experience.prompts[row], experience.completions[row]) for row in rows]
    mask = experience.mask[rows]
    names = ["old_logp", "values", "advantages", "returns"] + (["reference_logp"] if options.kl_in == "loss" else [])
    given = {name: getattr(experience, name) for name in names}
    numbers = {name: value[rows][mask] for name, value in given.items() if value is not None}
    return {**_pack(sequences, pad_id=pad_id, packing=packing), **numbers}


def ppo_objective(options: PPOOptions, kl_coefficient: float) -> LossFn:
    """PPO's loss of the policy and vf_coef times that of the value model, and the metrics of `ppo_step`."""
    fixed: dict[str, Any] = {"clip": options.clip, "clip_high": options.clip_high, "dual_clip": options.dual_clip}
    fixed |= {"entropy_coefficient": options.entropy_coef}
    in_loss = options.kl_in == "loss" and kl_coefficient > 0
    fixed |= {"kl_coefficient": kl_coefficient, "kl_estimator": options.estimator} if in_loss else {}

    def loss_fn(model: nn.Module, batch: Batch, items: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        names: tuple[str, ...] = ("old_logp", "advantages", "reference_logp") if in_loss else ("old_logp", "advantages")
        terms = {**fixed, **{name: batch[name] for name in names}, "normalizer": items}
        policy, values = model(batch["arguments"], batch["at"], temperature=options.temperature, ppo=terms)
        inside = torch.ones_like(batch["at"], dtype=torch.bool)
        value = value_loss(values, batch["values"], batch["returns"], inside, clip=options.value_clip, normalizer=items)
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
    """Align as configured; returns the last line of metrics.jsonl.

    Leaves the policy in output_dir/model, a value model of its own in output_dir/value. Raises ValueError for data, a tokenizer,
    a reward or a model that cannot be used, before a model is loaded.
    """
    with start(config) as world:
        micro_batch(config, world)
        attention = "sdpa" if config.attention == "auto" else config.attention
        tokenizer = load_tokenizer(config.tokenizer or config.model)
        architecture = AutoConfig.from_pretrained(config.model)
        scorer = find_function(config.reward) if is_function(config.reward) else find_classifier(config.reward, config.reward_label)
        reader = scorer if isinstance(scorer, Classifier) and scorer.reads(tokenizer) else None

        def prompts_of(source: str, split: str) -> list[Prompt]:
            return tokenize_prompts(load_rows(source, split=split), tokenizer, max_length=config.max_prompt_length)

        prompts = prompts_of(config.train_data, config.train_split)
        held_out = prompts_of(config.eval_data, config.eval_split) if config.eval_data else []
        longest = max(len(prompt.input_ids) for prompt in [*prompts, *held_out]) + config.max_new_tokens
        for read in [architecture, *([reader.architecture] if reader else [])]:
            check_fit(read, tokenizer, [[_sequence([0] * longest, [])]], lower="max_prompt_length or max_new_tokens")

        load = partial(load_model, config, world, attention=attention, packed=config.packing)
        policy = load(architecture, weights=config.model)
        reward = make_reward(config, world, scorer, tokenizer, attention)
        model = ActorCritic(policy, make_value(config, reader, load), kl_coefficient=config.kl_coef)
        without_dropout(model)
        return train(config, world, model, make_reference(config, policy), reward, tokenizer, prompts, held_out)


def train(
    config: PPOConfig,
    world: World,
    model: ActorCritic,
    reference: nn.Module | None,
    reward: Reward,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
) -> dict[str, float]:
    """Train `model` in place, fill output_dir, and return the last line of metrics.jsonl.

    A function of its own, as what DistributedDataParallel holds must go before the process group does.
    """
    wrapped = distribute(config, world, model)
    rates = {} if config.value_learning_rate is None else {"value.": config.value_learning_rate}
    optimizer = make_optimizer(config, model, rates)
    ends = end_ids(model.policy, tokenizer)
    at_once = config.rollout_batch_size or config.batch_size // world.size
    shared: dict[str, Any] = {"pad_id": padding_id(tokenizer), "packing": config.packing, "precision": autocast(config, world)}
    shared |= {"micro_batch_size": micro_batch(config, world), "world": world}

    def draw(chosen: Sequence[Prompt], **noise: int) -> Experience:
        options: dict[str, Any] = {"eos_id": ends, "reference": reference, "rollout_batch_size": at_once, **noise, **shared}
        return rollout(model, chosen, reward, config, **options)

    def take(step: int) -> tuple[dict[str, float], int]:
        began = time.perf_counter()
        numbers = rows_of_step(step, rows=len(prompts), batch_size=config.batch_size, seed=config.seed)
        experience = draw([prompts[number] for number in numbers], seed=config.seed, step=step)
        drawn = time.perf_counter()
        order: dict[str, Any] = {"seed": config.seed, "step": step}
        learnt = ppo_step(wrapped, optimizer, experience, config, **order, max_grad_norm=config.max_grad_norm, **shared)
        metrics = {**experience.metrics, **learnt, "lr": optimizer.param_groups[0]["lr"]}
        metrics |= {"seconds_rollout": drawn - began, "seconds_update": time.perf_counter() - drawn}
        return metrics, config.batch_size

    def judge() -> dict[str, float]:
        metrics = draw(held_out, seed=config.seed + 1).metrics  # other noise than that of training
        return {f"eval/{name}": value for name, value in metrics.items() if name.startswith(("objective/", "completions/"))}

    def save(folder: Path) -> None:
        model.save_pretrained(folder / "model", folder / "value")
        for name in ("model",) if model.shared else ("model", "value"):
            tokenizer.save_pretrained(str(folder / name))

    return run_steps(
        config,
        world,
        model,
        optimizer,
        take=take,
        judge=judge if held_out else None,
        save=save,
        rows=len(prompts),
        items_name="episode",
    )


def micro_batch(config: PPOConfig, world: World) -> int:
    """Sequences of one forward pass on one device. Raises ValueError where minibatches do not divide into those of all devices."""
    size = config.batch_size // config.minibatches
    micro = config.micro_batch_size or max(size // world.size, 1)
    if size % (micro * world.size):
        raise ValueError(
            f"batch_size / minibatches ({config.batch_size} / {config.minibatches}) must be a multiple of micro_batch_size x devices "
            f"({micro} x {world.size})"
        )
    return micro


def make_reward(
    config: PPOConfig, world: World, scorer: Classifier | Function, tokenizer: PreTrainedTokenizerBase, attention: str
) -> Reward:
    """The scores of completions, as configured."""
    if isinstance(scorer, Function):
        return by_function(scorer, tokenizer)
    options: dict[str, Any] = {"rows": micro_batch(config, world), "attention": attention, "packing": config.packing}
    return load_classifier(scorer, world, tokenizer, dtype=getattr(torch, config.dtype), **options)


def make_value(config: PPOConfig, reader: Classifier | None, load: Callable[..., Any]) -> Any:
    """The value model of its own, None for a shared one. `reader`: the reward model, if it reads the policy's tokens."""
    if config.value == "shared":
        return None
    usable = reader is not None and not reader.adapters and reader.labels == 1
    source = config.value_model or (config.reward if usable else config.model)
    architecture = AutoConfig.from_pretrained(source)
    value = load(architecture, weights=source, task="SEQ_CLS")
    if not any(kind.endswith("ForSequenceClassification") for kind in architecture.architectures or []):
        zero_head(value)
    return value


def make_reference(config: PPOConfig, policy: Any) -> nn.Module | None:
    """What the policy is held near: `rollout`'s argument."""
    if config.reference == "none":
        return None
    if isinstance(policy, PeftModel) and config.reference != "copy":
        return policy
    frozen: nn.Module = copy.deepcopy(policy).requires_grad_(False).eval()
    return frozen


def end_ids(policy: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a completion: the tokenizer's EOS, and those that the model generates by (the end of a turn, say)."""
    own = policy.generation_config.eos_token_id
    ids = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    found = sorted({id for id in ids if id is not None})
    if not found:
        raise ValueError("tokenizer: no EOS token, and the model's generation_config names none: completions could not end")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: `--config FILE key=value …`."""
    run(parse(PPOConfig, argv, prog="fastalign ppo"))


if __name__ == "__main__":
    main()
