"""One step of each stage, with fastalign's losses and with plain PyTorch's, on the stage's model and rows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

from .. import rollout
from ..actor_critic import ActorCritic
from ..causal_lm import fuse_head
from ..classifier import score_packed
from ..data.packing import collate, pack
from ..data.preference_pairs import (
    collate_pairs,
    collate_unpaired,
    mismatch,
    tokenize_pairs,
    tokenize_unpaired,
)
from ..data.readers import load_rows
from ..data.sequence_batches import last_tokens, pack_sequences, sequence_logps
from ..data.tokenization import tokenize_prompts, tokenize_sft, tokenize_text
from ..measure import PeakMemoryUnavailable, interleaved, peak_memories
from ..stages import dpo, kto, ppo, pretrain, reward, sft
from ..stages.config import read_config
from ..stages.models.reference_model import Reference
from ..stages.policy.reward_functions import by_function, find_function
from ..step_losses import fused_loss, plain_logps, plain_loss
from .progress import bar
from .results import STAGES, table

OURS, PLAIN = "fastalign", "plain PyTorch"
CONFIGS: dict[str, Any] = {
    "pretrain": pretrain.PretrainConfig,
    "sft": sft.SFTConfig,
    "reward": reward.RewardConfig,
}
CONFIGS |= {"dpo": dpo.DPOConfig, "kto": kto.KTOConfig, "ppo": ppo.PPOConfig}
TITLES = {
    **STAGES,
    "reward": "Reward model",
    "dpo-0.05": "DPO",
    "kto": "KTO",
    "ppo-vader": "PPO, one update",
    "rollout": "PPO, rollout",
}
ROUNDS = 7  # a step takes 0.1 to 0.3 s


class Step(NamedTuple):
    """A step of a run by a method.

    It has the median time, and the peak memory beyond weights, moments and batch if that can be measured.
    """

    run: str
    method: str
    milliseconds: float
    peak_mib: float | None


def step(folder: str, run: str, method: str) -> Callable[[], object]:
    """One step, as a call: forward, loss, backward, clipping and AdamW.

    The learning rate is 0, so that all calls start from the same weights. It ran once already, which made
    AdamW's moments.
    """
    call = _rollout(Path(folder), method) if run == "rollout" else _update(Path(folder), run, method)
    call()
    return call


def _update(folder: Path, run: str, method: str) -> Callable[[], object]:
    stage = run.split("-")[0]
    config = CONFIGS[stage](**read_config(str(folder / run / "config.yaml")))
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", trust_remote_code=False)
    model: Any = (
        _classifier(folder / run / "model") if stage == "reward" else _causal_lm(folder / run / "model")
    )
    if stage == "ppo":
        model = ActorCritic(model, _classifier(folder / run / "value"))
    batch = _batch(stage, config, model, tokenizer)
    logps = sequence_logps if method == OURS else plain_logps
    reference = _reference(stage, folder, batch, logps) if stage in ("dpo", "kto") else None
    loss = (fused_loss if method == OURS else plain_loss)(stage, config, model, batch, reference)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def call() -> Tensor:
        value = loss()
        torch.autograd.backward(value)
        nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return call


def _causal_lm(path: Path) -> Any:
    return fuse_head(AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False).eval())


def _classifier(path: Path) -> Any:
    return score_packed(
        AutoModelForSequenceClassification.from_pretrained(path, trust_remote_code=False).eval()
    )


def _reference(stage: str, folder: Path, batch: Mapping[str, Any], logps: Callable[..., Tensor]) -> Reference:
    """The tuned model. KTO scores by it at each step; DPO has a table."""
    model = _causal_lm(folder / "sft" / "model").requires_grad_(False)
    known = logps(model, batch["both"])
    return (lambda packed: known) if stage == "dpo" else partial(logps, model)


def _batch(stage: str, config: Any, model: Any, tokenizer: Any) -> Mapping[str, Any]:
    """A micro-batch of the run's first rows, as the stage makes it.

    Each sequence has its own copy of the prompt, because plain code shares none.
    """
    pad_id, rows = tokenizer.pad_token_id, load_rows(config.train_data)
    packer = partial(pack_sequences, pad_id=pad_id)
    if stage in ("pretrain", "sft"):
        length = config.sequence_length if stage == "pretrain" else config.max_length
        tokenize = tokenize_text if stage == "pretrain" else tokenize_sft
        sequences = tokenize(
            rows.select(range(min(5 * config.batch_size, len(rows)))), tokenizer, max_length=length
        )
        # A row holds 3.5 sentences or more.
        bins = pack([len(sequence.input_ids) for sequence in sequences], length)
        return collate(
            [[sequences[number] for number in bin_numbers] for bin_numbers in bins[: config.batch_size]],
            pad_id=pad_id,
        )
    rows = rows.select(range(min(config.batch_size, len(rows))))
    if stage == "ppo":
        prompts = tokenize_prompts(rows, tokenizer, max_length=config.max_prompt_length)
        score = by_function(find_function(config.reward), tokenizer)
        drawn = ppo.rollout(model, prompts, score, config, eos_id=tokenizer.eos_token_id, pad_id=pad_id)
        return ppo.experience_batch(
            drawn, list(range(len(prompts))), options=config, pad_id=pad_id, packing=config.packing
        )
    if stage == "kto":
        judged = tokenize_unpaired(rows, tokenizer, max_length=config.max_length)
        return collate_unpaired(
            mismatch(judged, seed=config.seed, step=0, max_length=config.max_length), packer=packer
        )
    batch = collate_pairs(tokenize_pairs(rows, tokenizer, max_length=config.max_length), packer=packer)
    return {**batch, "ends": last_tokens(batch["both"], pad_id=pad_id)} if stage == "reward" else batch


def _rollout(folder: Path, method: str) -> Callable[[], object]:
    """Completions of a step's prompts with the log-probabilities of their tokens.

    None ends early, so that both methods draw the same number of tokens.
    """
    config = ppo.PPOConfig(**read_config(str(folder / "ppo-vader" / "config.yaml")))
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder / "tokenizer", trust_remote_code=False),
        _causal_lm(folder / "sft" / "model"),
    )
    texts = load_rows(config.train_data)["prompt"][: config.batch_size]
    inputs = tokenizer(list(texts), return_tensors="pt", padding=True, return_token_type_ids=False)
    ids, mask, new, pad_id = (
        inputs["input_ids"],
        inputs["attention_mask"],
        config.max_new_tokens,
        tokenizer.pad_token_id,
    )
    if method == OURS:
        return partial(
            rollout.generate, model, ids, mask, max_new_tokens=new, seed=0, eos_id=None, pad_id=pad_id
        )
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=new, pad_token_id=pad_id
    )

    @torch.no_grad()
    def generate() -> Tensor:
        whole = model.generate(ids, attention_mask=mask)
        attention = torch.cat((mask, mask.new_ones(len(ids), new)), 1)
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        logits = model(
            input_ids=whole, attention_mask=attention, position_ids=positions, use_cache=False
        ).logits
        logps: Tensor = logits[:, -new - 1 : -1].log_softmax(-1).gather(2, whole[:, -new:, None])
        return logps

    return generate


def measure(folder: Path) -> list[Step]:
    """Each step by both methods: time in interleaved rounds, then memory in another process."""
    medians: dict[tuple[str, str], float] = {}
    for run in bar(TITLES, unit="step"):
        timings = interleaved(
            {method: step(str(folder), run, method) for method in (OURS, PLAIN)}, rounds=ROUNDS, warmup=1
        )
        medians |= {(run, method): timing.median for method, timing in timings.items()}
    calls = [{"folder": str(folder), "run": run, "method": method} for run, method in medians]
    peaks: list[float] | list[None]
    try:
        peaks = peak_memories(f"{__name__}:step", calls)
    except PeakMemoryUnavailable:
        peaks = [None] * len(calls)
    return [
        Step(run, method, 1000 * medians[run, method], peak)
        for (run, method), peak in zip(medians, peaks, strict=True)
    ]


NOTE = """\
One step of each stage on its own model and first rows: forward, loss, backward, clipping and AdamW; of PPO
one update of policy and critic, and the rollout of a step, all {tokens} tokens of every completion. Both get
the same packed batch, so that the difference is the head's and the loss's; at V {vocabulary} most of a step
is neither. Plain PyTorch keeps the logits, and samples by transformers' `generate`, from whose tokens it
takes the log-probabilities in another pass. Time: the median of {rounds} interleaved rounds. Peak memory:
beyond weights, moments and batch, gradients included. Whole run: with its evaluations; of two runs by DPO or
PPO, the first.
"""


@dataclass(frozen=True)
class SideBySide:
    """What the report says about the steps."""

    steps: Sequence[Step]
    whole: Mapping[str, float]
    """Seconds of whole runs."""
    tokens: int
    """Tokens of a completion in the rollout."""
    vocabulary: int

    def key_figures(self) -> list[str]:
        """A line for each step."""
        return [
            f"A step of {title}: {_figures(ours)}; {_figures(plain)}" for title, ours, plain in self._pairs()
        ]

    def report(self) -> list[str]:
        """The section of report.md."""
        rows = []
        for title, ours, plain in self._pairs():
            whole = f"{self.whole[ours.run]:.1f}" if ours.run in self.whole else ""
            peaks = [
                "not measured: needs Linux" if measured.peak_mib is None else f"{measured.peak_mib:,.1f}"
                for measured in (ours, plain)
            ]
            ratio = f"{plain.milliseconds / ours.milliseconds:.2f}"
            rows.append(
                [title, whole, f"{ours.milliseconds:,.0f}", f"{plain.milliseconds:,.0f}", ratio, *peaks]
            )
        header = (
            "stage",
            "whole run, s",
            f"{OURS}, ms",
            f"{PLAIN}, ms",
            "times faster",
            f"{OURS}, MiB",
            f"{PLAIN}, MiB",
        )
        note = NOTE.format(tokens=self.tokens, vocabulary=f"{self.vocabulary:,}", rounds=ROUNDS)
        return ["## The stages side by side", "", note, *table(header, rows), ""]

    def _pairs(self) -> list[tuple[str, Step, Step]]:
        """Title, and the step by this library and by plain PyTorch."""
        found = {(measured.run, measured.method): measured for measured in self.steps}
        return [(title, found[run, OURS], found[run, PLAIN]) for run, title in TITLES.items()]


def _figures(measured: Step) -> str:
    return f"{measured.method} {measured.milliseconds:,.0f} ms" + (
        "" if measured.peak_mib is None else f", {measured.peak_mib:,.0f} MiB"
    )
