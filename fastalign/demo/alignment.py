"""The reward model and the policies of the demo: train them, and compare their rewards and KL divergences.

The reward model learns from human ratings, policies from the tuned model's samples. Samples are drawn at
temperature 1, so that rewards and KL divergences are those of the policies themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from ..data.errors import DataError
from ..data.tokens import Prompt
from ..stages import dpo, grpo, kto, ppo, reward
from ..stages.policy.reward_functions import Reward
from ..stages.policy.scorers import find_classifier, load_classifier
from ..stages.runs.distributed import World
from .completions import draw
from .progress import bar, part
from .recipes import (
    BETAS,
    DRAWN_TITLES,
    PPO_TITLES,
    TITLES,
    dpo_config,
    grpo_config,
    kto_config,
    ppo_config,
    reward_config,
)
from .results import SHOWN, Mean, mean, table
from .sentences import Sample, labels_of, preferred, read_rows, write_rows
from .settings import Settings

POLICIES = {"sft": "SFT"} | {name: TITLES[name] for name in (*BETAS, *DRAWN_TITLES)}
PLOTS = ("alignment.png", "reward-kl.png")
LOSSES = ("loss", "eval/loss")
PLOTTED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # above, and below
    "reward": (LOSSES, ("accuracy", "eval/accuracy")),
    **dict.fromkeys(("dpo-0.05", "dpo-0.5"), (LOSSES, ("rewards/accuracies", "eval/rewards/accuracies"))),
    "kto": (LOSSES, ("rewards/margins",)),
    **dict.fromkeys(DRAWN_TITLES, (("objective/scores",), ("objective/kl",))),
}


class Policy(NamedTuple):
    """A policy's completions, judged.

    `rewards`: VADER's score by held-out prompt. `scores`: the reward model's, and `kls`: KL(policy ‖ SFT)
    in nats, both by completion. `texts`: some completions with their prompts.
    """

    name: str
    rewards: list[float]
    scores: list[float]
    kls: list[float]
    texts: list[tuple[str, str]]


@dataclass(frozen=True)
class Alignment:
    """What the report says about the reward model and the policies."""

    lines: dict[str, list[dict[str, float]]]
    """metrics.jsonl of each run."""
    lexicon: float
    """Accuracy of VADER's lexicon on the held-out pairs of the reward model."""
    counts: dict[str, int]
    policies: list[Policy]

    @property
    def accuracy(self) -> float:
        """Accuracy of the reward model on its held-out pairs."""
        return self.lines["reward"][-1]["eval/accuracy"]

    def gain(self, policy: Policy) -> Mean:
        """The reward over SFT's, prompt by prompt."""
        return mean(
            [after - before for before, after in zip(self.policies[0].rewards, policy.rewards, strict=True)]
        )

    def key_figures(self) -> list[str]:
        """The key figures of the reward model and of each policy, a line each."""
        pairs = self.counts["reward_held_out"]
        lines = [
            f"Reward model: {self.accuracy:.3f} of {pairs} held-out pairs in the right order; VADER's "
            f"lexicon {self.lexicon:.3f}"
        ]
        for policy in self.policies:
            gain = (
                ""
                if policy.name == "SFT"
                else f" (SFT's {self.gain(policy).value:+.3f} ± {self.gain(policy).error:.3f})"
            )
            lines.append(
                f"{policy.name}: mean sentiment of held-out prompts {mean(policy.rewards)}{gain}, "
                f"reward model's score {mean(policy.scores)}, KL to SFT {mean(policy.kls)} nats"
            )
        return lines

    def report(self) -> list[str]:
        """The sections of report.md."""
        shown = list(dict.fromkeys(prompt for prompt, _ in self.policies[0].texts))
        texts = [[text for _, text in policy.texts] for policy in self.policies]
        gains = ["" if policy.name == "SFT" else self.gain(policy) for policy in self.policies]
        rows = [
            (policy.name, mean(policy.rewards), gain, mean(policy.scores), mean(policy.kls))
            for policy, gain in zip(self.policies, gains, strict=True)
        ]
        header = (
            "policy",
            "mean sentiment",
            "over SFT, prompt by prompt",
            "reward model's score",
            "KL to SFT, nats a completion",
        )
        notes = self.counts | {"accuracy": f"{self.accuracy:.3f}", "lexicon": f"{self.lexicon:.3f}"}
        return [
            *(
                "## Reward model and policies",
                "",
                NOTE.format_map(notes),
                "![Reward against KL](reward-kl.png)",
                "",
            ),
            *(*table(header, rows), ""),
            *(
                "![Curves](alignment.png)",
                "",
                "## Samples of the policies",
                "",
                "At temperature 1, with the same noise.",
                "",
            ),
            *(
                *table(
                    ("prompt", *(policy.name for policy in self.policies)), zip(shown, *texts, strict=True)
                ),
                "",
            ),
        ]

    def plot(self, folder: Path) -> None:
        """Draw the curves of every run, and the policies' rewards against their KL divergences."""
        figure = Figure(figsize=(22, 6), layout="constrained")
        for (name, title), (above, below) in zip(
            TITLES.items(), figure.subplots(2, len(TITLES)).T, strict=True
        ):
            above.set(title=title)
            below.set(xlabel="rollout" if name in DRAWN_TITLES else "optimizer step")
            for axes, keys in zip((above, below), PLOTTED[name], strict=True):
                for key in keys:
                    points = [(line["step"], line[key]) for line in self.lines[name] if key in line]
                    style = (
                        {"marker": "o", "markersize": 4} if "eval/" in key else {"alpha": 0.6, "linewidth": 1}
                    )
                    if points:
                        axes.plot(*zip(*points, strict=True), label=key, **style)
                axes.grid(alpha=0.3)
                axes.legend()
        figure.savefig(folder / PLOTS[0], dpi=100)
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for policy in self.policies:
            (x, x_error), (y, y_error) = mean(policy.kls), mean(policy.rewards)
            axes.errorbar(
                x, y, xerr=x_error, yerr=y_error, marker="o", capsize=3, linestyle="", label=policy.name
            )
        axes.set(
            title="Held-out prompts", xlabel="KL to SFT (nats a completion)", ylabel="mean sentiment (VADER)"
        )
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(folder / PLOTS[1], dpi=120)


NOTE = """\
The reward model starts from the pre-trained model and learns from {reward_train:,} pairs of sentences that
people rated 0.5 or better and -0.5 or worse. Of {reward_held_out:,} pairs of held-out sentences it puts
{accuracy} in the right order; VADER's lexicon, a tie counted as half, {lexicon}.

The policies start from SFT. DPO learns from {pairs:,} pairs and KTO from {labels:,} labels, made of
{samples:,} of SFT's own completions of prompts to train on: VADER's compound score says which of two is
better, and which one is good. PPO, with a critic of its own and GAE, completes the same prompts itself:
{episodes:,} times in all, each completion scored by VADER, or by the reward model. GRPO has no critic. It
draws as many completions, {group} of each prompt, and compares those of a prompt by VADER's scores.

Sentiment: VADER's score of completions of {prompts:,} held-out prompts, {each} of each, and its mean over
prompts with the standard error; all policies draw with the same noise. KL: log-probability under the policy
minus that under SFT, of a whole completion, as the mean over the policy's own.
"""


def align(
    settings: Settings,
    tokenizer: PreTrainedTokenizerFast,
    sampled: Sequence[str],
    held_out: Sequence[str],
    seconds: dict[str, float],
) -> Alignment:
    """Train the reward model and the policies, and judge the policies.

    Policies learn from completions of `sampled`. One half of `held_out` judges them. SFT's completions of
    the other half are DPO's held-out pairs.
    """
    half = max(2, len(held_out) // 2)
    judged, watched = held_out[:half], held_out[half:][: settings.sampled // 3]
    folder, judge = settings.output_dir, SentimentIntensityAnalyzer()
    with part(TITLES["reward"], seconds):
        reward.run(reward_config(settings))
    with part("on-policy samples", seconds):
        both = sample(settings, tokenizer, [*sampled, *watched], judge)
        write_rows(folder / "samples.jsonl", [one._asdict() for one in both])
        samples = [one for one in both if one.prompt not in watched]
        pairs, labels = preferred(samples), labels_of(samples)
        desirable = sum(row["label"] for row in labels)
        if not pairs or not 0 < desirable < len(labels):
            raise DataError(
                f"completions of the tuned model: got {len(samples)} with {len(pairs)} pairs to learn from, "
                f"{desirable} good ones and {len(labels) - desirable} bad ones, expected at least 1 of each: "
                "take more --steps"
            )
        write_rows(folder / "rows" / "pairs.jsonl", pairs)
        write_rows(
            folder / "rows" / "pairs_held_out.jsonl", preferred(one for one in both if one.prompt in watched)
        )
        write_rows(folder / "rows" / "labels.jsonl", labels)
        write_rows(folder / "rows" / "prompts.jsonl", [{"prompt": prompt} for prompt in sampled])
    for name in (*BETAS, *DRAWN_TITLES):
        with part(TITLES[name], seconds):
            if name == "kto":
                kto.run(kto_config(settings, desirable, len(labels) - desirable))
            elif name in PPO_TITLES:
                ppo.run(ppo_config(settings, name))
            elif name in DRAWN_TITLES:
                grpo.run(grpo_config(settings))
            else:
                dpo.run(dpo_config(settings, name))
    with part("rewards and KL divergences", seconds):
        policies = judge_policies(settings, tokenizer, judged, judge)
    lines = {name: read_rows(folder / name / "metrics.jsonl") for name in TITLES}
    rated = {
        name: read_rows(folder / "rows" / f"{name}.jsonl") for name in ("reward_train", "reward_held_out")
    }
    counts = {name: len(rows) for name, rows in rated.items()} | {
        "samples": len(samples),
        "pairs": len(pairs),
        "labels": len(labels),
        "prompts": len(judged),
        "episodes": int(lines["ppo-vader"][-1]["episode"]),
        "each": settings.samples,
        "group": grpo_config(settings).group_size,
    }
    return Alignment(lines, lexicon_accuracy(rated["reward_held_out"], judge), counts, policies)


def lexicon_accuracy(pairs: Sequence[dict[str, Any]], judge: SentimentIntensityAnalyzer) -> float:
    """The share of pairs whose chosen text VADER scores higher; a tie counts as half."""
    scores = [
        [judge.polarity_scores(row[name])["compound"] for name in ("chosen", "rejected")] for row in pairs
    ]
    return sum((chosen > rejected) + (chosen == rejected) / 2 for chosen, rejected in scores) / len(scores)


def sample(
    settings: Settings,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    judge: SentimentIntensityAnalyzer,
) -> list[Sample]:
    """The tuned model's completions of the prompts, prompt by prompt.

    Left out are completions that did not end (they would be taught to end where they were cut), blank ones,
    and those whose first token merges with the prompt's last when they are read as one text.
    """
    found = []
    options = {"max_new_tokens": settings.policy_tokens, "seed": settings.seed}
    repeated = [prompt for prompt in prompts for _ in range(settings.samples)]
    for batch, _, drawn in draw(load(settings, "sft"), tokenizer, repeated, **options):
        prompt_ids = [tokenizer.encode(prompt) for prompt in batch]
        ended = (drawn.tokens == tokenizer.eos_token_id).any(1).tolist()
        texts = tokenizer.batch_decode(drawn.tokens, skip_special_tokens=True)
        for prompt, ids, text, whole in zip(batch, prompt_ids, texts, ended, strict=True):
            if whole and text.strip() and tokenizer.encode(prompt + text)[: len(ids)] == ids:
                found.append(Sample(prompt, text, judge.polarity_scores(text)["compound"]))
    return found


def judge_policies(
    settings: Settings,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    judge: SentimentIntensityAnalyzer,
) -> list[Policy]:
    """Completions by each policy, judged by VADER and the reward model, with their KL to SFT."""
    reference, score, policies = load(settings, "sft"), rewarded(settings, tokenizer), []
    repeated = [prompt for prompt in prompts for _ in range(settings.samples)]
    options = {"max_new_tokens": settings.policy_tokens, "seed": settings.seed + 1}
    for name, title in bar(POLICIES.items(), unit="policy"):
        kls, scores, texts = [], [], []
        for batch, inputs, drawn in draw(load(settings, name), tokenizer, repeated, **options):
            before = log_probabilities(
                reference, inputs["input_ids"], inputs["attention_mask"], drawn.tokens, drawn.mask
            )
            kls += (drawn.logp_raw.double().sum(1) - before).tolist()
            ids = [
                Prompt(row[kept.bool()].tolist())
                for row, kept in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
            ]
            scores += score(
                ids, [row[kept].tolist() for row, kept in zip(drawn.tokens, drawn.mask, strict=True)]
            ).tolist()
            texts += list(
                zip(batch, tokenizer.batch_decode(drawn.tokens, skip_special_tokens=True), strict=True)
            )
        found = [judge.polarity_scores(text)["compound"] for _, text in texts]
        rewards = (
            torch.tensor(found, dtype=torch.float64).view(len(prompts), settings.samples).mean(1).tolist()
        )
        policies.append(Policy(title, rewards, scores, kls, texts[:: settings.samples][:SHOWN]))
    return policies


def rewarded(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> Reward:
    """The reward model's scores of prompts and completions, as PPO takes them."""
    classifier, world = (
        find_classifier(str(settings.output_dir / "reward" / "model"), None),
        World(0, 1, torch.device("cpu")),
    )
    return load_classifier(
        classifier, world, tokenizer, dtype=torch.float32, rows=64, attention="sdpa", packing=True
    )


@torch.no_grad()
def log_probabilities(
    model: PreTrainedModel, ids: Tensor, attention_mask: Tensor, tokens: Tensor, mask: Tensor
) -> Tensor:
    """log P(completion | prompt), fp64 [B] in nats: of the `tokens` [B, R] where `mask` is set.

    Prompts are padded on the left.
    """
    attention = torch.cat((attention_mask, mask.long()), 1)
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    logits = model(
        input_ids=torch.cat((ids, tokens), 1),
        attention_mask=attention,
        position_ids=positions,
        use_cache=False,
    ).logits
    logps = logits[:, ids.shape[1] - 1 : -1].log_softmax(-1).gather(2, tokens[..., None])[..., 0]
    return (logps.double() * mask).sum(1)


def load(settings: Settings, stage: str) -> PreTrainedModel:
    """The model that a stage left."""
    return AutoModelForCausalLM.from_pretrained(
        settings.output_dir / stage / "model", trust_remote_code=False
    ).eval()
