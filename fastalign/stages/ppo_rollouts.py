"""PPO's rollout: completions of prompts with their scores, values and advantages.

`rollout` is a plain function that you can call from your own loop, as is ppo.py's `ppo_step`, which learns
from its result. The old log-probabilities are those that the rollout returned: of the tempered policy
before top-k, top-p and min-p, which is the one that the update scores. So ratios begin at 1
(docs/rollout_logprobs.md).
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastalign_kernels import gae, masked_whiten

from ..actor_critic import ActorCritic
from ..data.sequence_batches import pack_sequences
from ..data.tokens import Prompt, Tokenized
from ..rollout.generation import generate
from .batches import Batch
from .distributed import World
from .policy_configs import PPOOptions

# Prompts and completions (tokens) -> a score for each.
Score = Callable[[Sequence[Prompt], Sequence[list[int]]], Tensor | Sequence[float]]


class Experience(NamedTuple):
    """The completions of a step's prompts, of all ranks, with what `ppo_step` learns from them.

    B completions of at most R tokens. `mask`: bool [B, R]. Of its shape, in nats or units of the reward:
    `old_logp`, `reference_logp` (None without a reference), `values`, `advantages`, `returns`. `scores`:
    [B]. `metrics`: those of the rollout.
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
    score: Score,
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
    """Complete the prompts, score the completions, and estimate the advantage of each token.

    Args:
        prompts: those of all ranks; each rank completes a block of them. `fastalign.data.Prompt(ids)` makes
            one of tokens.
        score: from this rank's prompts and completions (tokens, EOS included) to a score for each, [B].
        eos_id: ids that end a completion.
        reference: a causal LM with a fused head, or `model.policy` itself, which then runs without its
            adapters.
        seed, step: key the noise. The same weights, seed and step draw the same tokens.
        micro_batch_size, rollout_batch_size: sequences in a forward pass, and in a batch of the rollout.
            Default: all.
        packing: put several sequences into a row, as in `fastalign.data.pack_sequences`.
        precision: autocast of the forward passes.
        world: the ranks. Default: this process alone.

    Metrics, means over the completions unless noted:

        objective/kl: nats, the sum over tokens of the log-ratio of policy and reference.
        objective/entropy: nats, minus the sum of log-probabilities.
        objective/scores: the scores.
        objective/non_score_reward: the KL divergence's share of the rewards.
        objective/rlhf_reward: the sum of the two above.
        completions/mean_length: tokens.
        val/num_eos_tokens: how many completions ended.
        val/explained_variance: of the returns by the old values.

    Raises FloatingPointError for logits that are not finite.
    """
    world = world or World(0, 1, model.device)
    first, end = (len(prompts) * rank // world.size for rank in (world.rank, world.rank + 1))
    if len(prompts) < world.size:
        raise ValueError(
            f"prompts: got {len(prompts)}, expected at least one for each of the {world.size} ranks"
        )
    local_prompts = prompts[first:end]
    with precision or nullcontext():
        draw = partial(_draw, model, options=options, eos_id=eos_id, pad_id=pad_id, seed=seed)
        size = rollout_batch_size or len(local_prompts)
        parts = [
            draw(local_prompts[at : at + size], step * len(prompts) + first + at)
            for at in range(0, len(local_prompts), size)
        ]
        completions = [ids for part, _ in parts for ids in part]
        lengths = torch.tensor([len(ids) for ids in completions])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        drawn = _in_rows(torch.cat([logp for _, logp in parts]), mask.to(model.device))
        scores = _scores(score, local_prompts, completions)
        sequences = [
            _sequence(prompt.input_ids, ids) for prompt, ids in zip(local_prompts, completions, strict=True)
        ]
        passes = partial(
            _passes,
            world=world,
            sequences=sequences,
            mask=mask,
            rows=micro_batch_size,
            pad_id=pad_id,
            packing=packing,
        )
        values = passes(model.values)
        reference_logp = (
            None if reference is None else passes(partial(_logps, model, reference, options.temperature))
        )
        rescored = passes(partial(_logps, model, None, options.temperature)) if options.rescore else None

    named = {
        "mask": mask,
        "drawn": drawn,
        "scores": scores,
        "values": values,
        "reference": reference_logp,
        "rescored": rescored,
    }
    whole = _gather(world, {name: tensor for name, tensor in named.items() if tensor is not None})
    all_completions = [ids for part in _gather_lists(world, completions) for ids in part]
    return _estimate(model, options, [prompt.input_ids for prompt in prompts], all_completions, whole, eos_id)


def _scores(score: Score, prompts: Sequence[Prompt], completions: Sequence[list[int]]) -> Tensor:
    """fp64 [completions]. Raises if `score` does not return a finite number for each."""
    scores = torch.as_tensor(score(prompts, completions), dtype=torch.float64)
    if scores.shape != (len(prompts),):
        raise ValueError(
            f"score: got shape {list(scores.shape)}, expected [{len(prompts)}], a score for each completion"
        )
    if not scores.isfinite().all():
        raise FloatingPointError(
            f"score: got no finite number for {int((~scores.isfinite()).sum())} of {len(prompts)} "
            "completions, expected one for each"
        )
    return scores


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
    """Completions in tokens, and their tokens' log-probabilities [tokens] under the tempered policy."""
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
        compile=options.compile_rollout,
        sequence_ids=torch.arange(first_id, first_id + len(prompts), device=model.device),
    )
    completions = [
        row[:length] for row, length in zip(drawn.tokens.tolist(), drawn.lengths.tolist(), strict=True)
    ]
    return completions, (drawn.logp + drawn.log_kept)[drawn.mask]


def _sequence(prompt: list[int], completion: list[int]) -> Tokenized:
    return Tokenized(prompt + completion, [False] * len(prompt) + [True] * len(completion))


def _pack(sequences: Sequence[Tokenized], *, pad_id: int, packing: bool) -> Batch:
    """`pack_sequences`'s arguments, and `at`, int64 [N]: the place before each scored token, by sequence."""
    packed = pack_sequences(sequences, pad_id=pad_id, packing=packing)
    begins = packed["starts"][packed["places"]].tolist()
    spans = [
        (begin + s.trained.index(True) - 1, begin + len(s.trained) - 1)
        for begin, s in zip(begins, sequences, strict=True)
    ]
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


def _logps(
    model: ActorCritic, reference: nn.Module | None, temperature: float, arguments: Any, at: Tensor
) -> Tensor:
    """Log-probabilities [N] of the scored tokens under the tempered reference (None: the policy)."""
    policy: Any = model.policy
    with policy.disable_adapter() if reference is model.policy else nullcontext():
        scorer = policy if reference is None else reference
        logp: Tensor = scorer(**arguments, use_cache=False, token_stats=True, temperature=temperature).logp
    return logp.flatten()[at]


def _in_rows(values: Tensor, mask: Tensor) -> Tensor:
    return values.new_zeros(mask.shape).masked_scatter_(mask, values)


def _gather(world: World, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows of all ranks, padded with 0 to one length, on this rank's device."""
    if world.size == 1:
        return {name: tensor.to(world.device) for name, tensor in tensors.items()}
    parts = _gather_lists(world, {name: tensor.cpu() for name, tensor in tensors.items()})
    longest = max(part["mask"].shape[1] for part in parts)

    def padded(tensor: Tensor) -> Tensor:
        return nn.functional.pad(tensor, (0, longest - tensor.shape[1])) if tensor.dim() == 2 else tensor

    return {name: torch.cat([padded(part[name]) for part in parts]).to(world.device) for name in tensors}


def _gather_lists(world: World, local: Any) -> list[Any]:
    parts: list[Any] = [local]
    if world.size > 1:
        parts = [None] * world.size
        dist.all_gather_object(parts, local)
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
    mask, drawn, scores, values, reference = (
        whole.get(name) for name in ("mask", "drawn", "scores", "values", "reference")
    )
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
        metrics |= {
            "mismatch/ratio": difference.exp().mean(),
            "mismatch/approxkl": (difference**2).mean() / 2,
        }
        if options.importance_cap is not None:
            advantages = advantages * (old - drawn).exp().clamp(max=options.importance_cap)
    if reference is None:
        del metrics["objective/kl"]
    numbers = dict(
        zip(metrics, torch.stack([value.double() for value in metrics.values()]).tolist(), strict=True)
    )
    return Experience(
        prompts, completions, mask, old, reference, values, advantages, returns, scores, numbers
    )


def _kl(d: Tensor, estimator: str) -> Tensor:
    return {"k1": lambda: d, "k2": lambda: d**2 / 2, "k3": lambda: torch.expm1(-d) + d}[estimator]()


def experience_batch(
    experience: Experience, rows: list[int], *, options: PPOOptions, pad_id: int, packing: bool
) -> Batch:
    """The micro-batch of these completions: what `_pack` gives, and the tokens' numbers, each [N]."""
    sequences = [_sequence(experience.prompts[row], experience.completions[row]) for row in rows]
    mask = experience.mask[rows]
    names = ["old_logp", "values", "advantages", "returns"] + (
        ["reference_logp"] if options.kl_in == "loss" else []
    )
    given = {name: getattr(experience, name) for name in names}
    numbers = {name: value[rows][mask] for name, value in given.items() if value is not None}
    return {**_pack(sequences, pad_id=pad_id, packing=packing), **numbers}
