"""Completions of a step's prompts with their scores and log-probabilities, for PPO and GRPO.

The old log-probabilities are the rollout's, of the policy that the update scores: ratios begin at 1
(docs/rollout_logprobs.md). Under a filter that is the policy over the kept ids, which are handed on; with
filtered_policy=false it is the tempered policy before the filter.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastalign_kernels.sampling_kept import KeptIds

from ...data.sequence_batches import pack_sequences
from ...data.tokens import Prompt, Tokenized
from ...fused_options import draws_screened
from ...rollout.generation import generate
from ..batches import Batch
from ..models.sharding import is_sharded, whole
from ..policy_configs import RolloutOptions
from ..runs.distributed import World
from .shared_rows import SharedRows, block

Row = TypeVar("Row")
# Prompts and completions (tokens) -> a score for each.
Score = Callable[[Sequence[Prompt], Sequence[list[int]]], Tensor | Sequence[float]]
# A packed micro-batch (`_pack`'s, on the device) -> a number for each scored token, [N].
TokenScore = Callable[[Batch], Tensor]


class Completed(Protocol):
    """What `token_batch` reads of an experience."""

    @property
    def prompts(self) -> list[list[int]]: ...
    @property
    def completions(self) -> Sequence[list[int]]: ...
    @property
    def mask(self) -> Tensor: ...
    @property
    def kept(self) -> Sequence[KeptIds] | None: ...


class Drawn(NamedTuple):
    """The completions of a step's prompts, of all ranks.

    Numbers are on all ranks: advantages depend on all completions. Of several ranks, `completions` and `kept`
    are `SharedRows`: a rank holds what it drew and what it fetches to learn from.

    B completions of at most R tokens. `mask`: bool [B, R]. Of its shape, in nats: `drawn_logp`, as the
    rollout returned it, `old_logp`, which is that or the trainer's (rescore), `reference_logp` (None without
    a reference). `scores`: fp64 [B], less missing_eos_penalty. `ended`: bool [B], whether the last token ends
    it. `kept`: the ids that the filter kept at each token of each completion, on the CPU; None without a
    filter. `kept_numbers`: [B], how many these are. `further`: [B, R] of each function in
    `draw_completions`'s argument of that name.
    """

    prompts: list[list[int]]
    completions: Sequence[list[int]]
    mask: Tensor
    drawn_logp: Tensor
    old_logp: Tensor
    reference_logp: Tensor | None
    scores: Tensor
    ended: Tensor
    kept: Sequence[KeptIds] | None
    kept_numbers: Tensor | None
    further: dict[str, Tensor]

    def log_ratio(self) -> Tensor:
        """log π − log π_ref, [B, R] in nats; 0 without a reference."""
        if self.reference_logp is None:
            return torch.zeros_like(self.old_logp)
        return self.old_logp - self.reference_logp

    def importance(self, cap: float | None) -> Tensor | None:
        """The ratio of the trainer's and the rollout's probabilities, at most `cap`; None without a cap."""
        return None if cap is None else (self.old_logp - self.drawn_logp).exp().clamp(max=cap)

    def metrics(self, options: RolloutOptions) -> dict[str, Tensor]:
        """The metrics that `draw_completions` lists."""
        found = {
            "objective/entropy": -self.old_logp.sum(1).mean(),
            "objective/scores": self.scores.mean(),
            "completions/mean_length": self.mask.sum(1).double().mean(),
            "val/num_eos_tokens": self.ended.sum(),
        }
        if self.kept_numbers is not None:
            found["completions/kept_ids"] = self.kept_numbers.sum() / self.mask.sum().double()
        if self.reference_logp is not None:
            found["objective/kl"] = self.log_ratio().sum(1).mean()
        if options.rescore:
            difference = (self.old_logp - self.drawn_logp)[self.mask]
            found["mismatch/ratio"] = difference.exp().mean()
            found["mismatch/approxkl"] = (difference**2).mean() / 2
        return found


@torch.no_grad()
def draw_completions(
    policy: Any,
    prompts: Sequence[Prompt],
    score: Score,
    options: RolloutOptions,
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
    further: Mapping[str, tuple[nn.Module, TokenScore]] | None = None,
) -> Drawn:
    """Complete the prompts and score the completions.

    Args:
        policy: a causal LM with a fused head, or PEFT's wrapper of one. With `screen` it draws so on a CPU.
        prompts: those of all ranks; each rank completes a block of them. `fastalign.data.Prompt(ids)` makes
            one of tokens.
        score: from this rank's prompts and completions (tokens, EOS included) to a score for each, [B].
        eos_id: ids that end a completion.
        reference: a causal LM with a fused head, or the policy itself, which then runs without its
            adapters.
        seed, step: key the noise. The same weights, seed and step draw the same tokens.
        micro_batch_size, rollout_batch_size: sequences in a forward pass, and in a batch of the rollout.
            Default: all.
        packing: put several sequences into a row, as in `fastalign.data.pack_sequences`.
        precision: autocast of the forward passes.
        world: the ranks. Default: this process alone.
        further: a module for each name, and what gives a number to each token by it.

    Metrics (`Drawn.metrics`), means over the completions unless noted:

        objective/kl: nats, the sum over tokens of the log-ratio of policy and reference.
        objective/entropy: nats, minus the sum of log-probabilities.
        objective/scores: the scores.
        completions/mean_length: tokens.
        completions/kept_ids: ids that the filter kept, mean over tokens; only where kept sets are handed on.
        val/num_eos_tokens: how many completions ended.
        mismatch/ratio, mismatch/approxkl: with `rescore`, means over tokens of the ratio of trainer and
            rollout, and of (difference of logs)² / 2.

    Raises FloatingPointError for logits that are not finite.
    """
    world = world or World(0, 1, policy.device)
    local_rows = block(len(prompts), world.size, world.rank)
    first = local_rows.start
    if len(prompts) < world.size:
        raise ValueError(
            f"prompts: got {len(prompts)}, expected at least one for each of the {world.size} ranks"
        )
    local_prompts = prompts[first : local_rows.stop]
    with precision or nullcontext():
        draw = partial(_draw, policy, options=options, eos_id=eos_id, pad_id=pad_id, seed=seed)
        size = rollout_batch_size or len(local_prompts)
        scorers: dict[str, tuple[nn.Module, TokenScore]] = dict(further or {})
        if reference is not None:
            adapters_off = reference is policy
            scorers["reference"] = (
                reference,
                partial(_logps, reference, options.temperature, adapters_off=adapters_off),
            )
        if options.rescore:
            scorers["rescored"] = (policy, partial(_logps, policy, options.temperature))
        by_policy = {
            name: scorer
            for name, scorer in scorers.items()
            if any(part is policy for part in scorer[0].modules())
        }
        # Ranks draw different numbers of tokens and may have different numbers of rows. So a sharded model is
        # gathered once for all that it does, and then freed.
        with whole(policy):
            parts = [
                draw(local_prompts[at : at + size], step * len(prompts) + first + at)
                for at in range(0, len(local_prompts), size)
            ]
            completions = [ids for part in parts for ids in part.completions]
            lengths = torch.tensor([len(ids) for ids in completions])
            mask = torch.arange(int(lengths.max())) < lengths[:, None]
            drawn = _in_rows(torch.cat([part.logp for part in parts]), mask.to(world.device))
            kept = [sets for part in parts for sets in part.kept] if options.keeps_sets else None
            passes = partial(
                _passes,
                world=world,
                sequences=[
                    _sequence(prompt.input_ids, ids)
                    for prompt, ids in zip(local_prompts, completions, strict=True)
                ],
                kept=kept,
                mask=mask,
                rows=micro_batch_size,
                pad_id=pad_id,
                packing=packing,
            )
            found = {name: passes(*scorer) for name, scorer in by_policy.items()}
        scores = _scores(score, local_prompts, completions)
        found |= {name: passes(*scorer) for name, scorer in scorers.items() if name not in by_policy}
    ends = {eos_id} if isinstance(eos_id, int) else set(eos_id)
    found["ended"] = torch.tensor([ids[-1] in ends for ids in completions])
    found |= {} if kept is None else {"kept_numbers": torch.tensor([len(sets.ids) for sets in kept])}
    gathered = _gather(world, {"mask": mask, "drawn": drawn, "scores": scores, **found})
    scores = gathered["scores"]
    if options.missing_eos_penalty is not None:
        scores = scores - options.missing_eos_penalty * ~gathered["ended"]
    return Drawn(
        prompts=[prompt.input_ids for prompt in prompts],
        completions=_of_all_ranks(world, completions, len(prompts)),
        mask=gathered["mask"],
        drawn_logp=gathered["drawn"],
        old_logp=gathered.get("rescored", gathered["drawn"]),
        reference_logp=gathered.get("reference"),
        scores=scores,
        ended=gathered["ended"],
        kept=None if kept is None else _of_all_ranks(world, kept, len(prompts)),
        kept_numbers=gathered.get("kept_numbers"),
        further={name: gathered[name] for name in further or {}},
    )


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


class _Part(NamedTuple):
    """A batch of the rollout: completions in tokens, log-probabilities [tokens], and kept ids of each."""

    completions: list[list[int]]
    logp: Tensor
    kept: list[KeptIds]


def _draw(
    policy: Any,
    prompts: Sequence[Prompt],
    first_id: int,
    *,
    options: RolloutOptions,
    eos_id: int | Sequence[int],
    pad_id: int,
    seed: int,
) -> _Part:
    """Completions, with log-probabilities under the filtered policy if its sets are kept, else the tempered
    one."""
    width = max(len(prompt.input_ids) for prompt in prompts)
    padding = [width - len(prompt.input_ids) for prompt in prompts]
    ids = [[pad_id] * left + prompt.input_ids for left, prompt in zip(padding, prompts, strict=True)]
    mask = [[0] * left + [1] * (width - left) for left in padding]
    drawn = generate(
        policy,
        torch.tensor(ids, device=policy.device),
        torch.tensor(mask, device=policy.device),
        max_new_tokens=options.max_new_tokens,
        seed=seed,
        eos_id=eos_id,
        pad_id=pad_id,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        return_kept=options.keeps_sets,
        screen=draws_screened(policy),
        # A graph of a sharded model would capture FSDP2's streams.
        cuda_graph=not is_sharded(policy),
        compile=options.compile_rollout,
        sequence_ids=torch.arange(first_id, first_id + len(prompts), device=policy.device),
    )
    completions = [row[:n] for row, n in zip(drawn.tokens.tolist(), drawn.lengths.tolist(), strict=True)]
    if drawn.kept_ids is None:
        return _Part(completions, (drawn.logp + drawn.log_kept)[drawn.mask], [])
    offsets, kept_ids = (tensor.cpu() for tensor in drawn.kept_ids)
    kept, R = [], drawn.tokens.shape[1]
    for row, ids in enumerate(completions):
        of_row = offsets[row * R : row * R + len(ids) + 1]
        kept.append(KeptIds(of_row - of_row[0], kept_ids[of_row[0] : of_row[-1]]))
    return _Part(completions, drawn.logp[drawn.mask], kept)


def _sequence(prompt: list[int], completion: list[int]) -> Tokenized:
    return Tokenized(prompt + completion, [False] * len(prompt) + [True] * len(completion))


def _pack(
    sequences: Sequence[Tokenized], kept: Sequence[KeptIds] | None, *, pad_id: int, packing: bool
) -> Batch:
    """`pack_sequences`'s arguments and `starts`, and where the N scored tokens are.

    `at`, int64 [N]: the place before each scored token, by sequence. `kept_offsets`, `kept_ids`: the sets of
    all B·T places in CSR, empty where no token is scored, if `kept` has them.
    """
    packed = pack_sequences(sequences, pad_id=pad_id, packing=packing)
    begins = packed["starts"][packed["places"]].tolist()
    spans = [
        (begin + s.trained.index(True) - 1, begin + len(s.trained) - 1)
        for begin, s in zip(begins, sequences, strict=True)
    ]
    at = torch.cat([torch.arange(*span) for span in spans])
    batch = {"arguments": packed["arguments"], "starts": packed["starts"], "at": at}
    if kept is None:
        return batch
    sizes = torch.zeros(packed["arguments"]["labels"].numel(), dtype=torch.int64)
    sizes[at] = torch.cat([sets.offsets.diff() for sets in kept])
    by_place = sorted(range(len(kept)), key=lambda number: spans[number])
    return batch | {
        "kept_offsets": nn.functional.pad(sizes.cumsum(0), (1, 0)),
        "kept_ids": torch.cat([kept[number].ids for number in by_place]),
    }


def kept_of(batch: Batch) -> tuple[Tensor, Tensor] | None:
    """The kept sets of a packed micro-batch as `kept=` takes them; None if all ids are kept."""
    return (batch["kept_offsets"], batch["kept_ids"]) if "kept_ids" in batch else None


def _passes(
    model: nn.Module,
    score: TokenScore,
    *,
    world: World,
    sequences: Sequence[Tokenized],
    kept: Sequence[KeptIds] | None,
    mask: Tensor,
    rows: int | None,
    pad_id: int,
    packing: bool,
) -> Tensor:
    """What `score` gives each scored token by the model, [B, R], some rows at a time."""
    rows = rows or len(sequences)
    found = []
    with whole(model):
        for first in range(0, len(sequences), rows):
            part = slice(first, first + rows)
            sets = None if kept is None else kept[part]
            found.append(score(world.place(_pack(sequences[part], sets, pad_id=pad_id, packing=packing))))
    return _in_rows(torch.cat(found), mask.to(world.device))


def _logps(model: Any, temperature: float, batch: Batch, *, adapters_off: bool = False) -> Tensor:
    """Log-probabilities [N] of the scored tokens under the tempered model, over kept ids if there are any."""
    options: dict[str, Any] = {"use_cache": False, "token_stats": True, "temperature": temperature}
    with model.disable_adapter() if adapters_off else nullcontext():
        logp: Tensor = model(**batch["arguments"], **options, kept=kept_of(batch)).logp
    return logp.flatten()[batch["at"]]


def _in_rows(values: Tensor, mask: Tensor) -> Tensor:
    return values.new_zeros(mask.shape).masked_scatter_(mask, values)


def _gather(world: World, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows of all ranks, padded with 0 to one length, on this rank's device."""
    if world.size == 1:
        return {name: tensor.to(world.device) for name, tensor in tensors.items()}
    parts: list[Any] = [None] * world.size
    dist.all_gather_object(parts, {name: tensor.cpu() for name, tensor in tensors.items()})
    longest = max(part["mask"].shape[1] for part in parts)

    def padded(tensor: Tensor) -> Tensor:
        return nn.functional.pad(tensor, (0, longest - tensor.shape[1])) if tensor.dim() == 2 else tensor

    return {name: torch.cat([padded(part[name]) for part in parts]).to(world.device) for name in tensors}


def _of_all_ranks(world: World, local: list[Row], total: int) -> Sequence[Row]:
    return local if world.size == 1 else SharedRows(world, local, total)


def estimate_kl(d: Tensor, estimator: str) -> Tensor:
    """The estimate of a token's KL divergence from its log-ratio d, in nats."""
    return {"k1": lambda: d, "k2": lambda: d**2 / 2, "k3": lambda: torch.expm1(-d) + d}[estimator]()


def token_batch(
    experience: Completed, rows: list[int], names: Sequence[str], *, pad_id: int, packing: bool
) -> Batch:
    """The micro-batch of these completions: what `_pack` gives, and the named tensors' numbers, [N] each."""
    sequences = [_sequence(experience.prompts[row], experience.completions[row]) for row in rows]
    kept = None if experience.kept is None else [experience.kept[row] for row in rows]
    mask = experience.mask[rows]
    numbers = {name: getattr(experience, name)[rows][mask] for name in names}
    return {**_pack(sequences, kept, pad_id=pad_id, packing=packing), **numbers}
