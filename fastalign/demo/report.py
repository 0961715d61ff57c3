"""The demo's report: curves, samples, sentiment, and this library beside plain PyTorch."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from ..measure import machine
from .heads import Head, head_rows, memory_text
from .results import STAGES, TEMPERATURE, Completion, Curve, Mean, mean, table

if TYPE_CHECKING:
    from .alignment import Alignment
    from .stage_steps import SideBySide


@dataclass(frozen=True)
class Outcome:
    """What the report says about a run."""

    folder: Path
    data: Path | None
    steps: int
    seed: int
    threads: int
    counts: Mapping[str, int]
    """Rows of each file."""
    seconds: Mapping[str, float]
    curves: Mapping[str, Curve]
    completions: Sequence[Completion]
    alignment: "Alignment"
    stages: "SideBySide"
    heads: Sequence[Head]

    def sentiment(self, stage: str) -> Mean:
        """Mean sentiment of a stage's sampled completions."""
        return mean(self._sampled(stage))

    def gain(self) -> Mean:
        """What SFT adds to the sentiment, prompt by prompt."""
        return mean(
            [
                after - before
                for before, after in zip(self._sampled("pretrain"), self._sampled("sft"), strict=True)
            ]
        )

    def _sampled(self, stage: str) -> list[float]:
        return [done.sentiment for done in self.completions if done.stage == stage and done.mode == "sampled"]


def plot(curve: Curve, title: str, path: Path) -> None:
    """Draw both losses over the steps."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        *zip(*curve.training, strict=True), color="tab:blue", alpha=0.5, linewidth=1, label="training batch"
    )
    axes.plot(
        *zip(*curve.held_out, strict=True), color="tab:orange", marker="o", markersize=4, label="held out"
    )
    axes.set(title=title, xlabel="optimizer step", ylabel="NLL (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def key_figures(outcome: Outcome) -> list[str]:
    """The run in a few lines."""
    lines = []
    for stage, title in STAGES.items():
        held_out = outcome.curves[stage].held_out
        what = "sentences" if stage == "pretrain" else "continuations of positive sentences"
        lines.append(
            f"{title}: held-out NLL of {what} {held_out[0][1]:.3f} -> {held_out[-1][1]:.3f} nats per token "
            f"in {held_out[-1][0]} steps"
        )
    lines.append(
        f"Sentiment of sampled completions: {outcome.sentiment('pretrain')} before SFT, "
        f"{outcome.sentiment('sft')} after; gain {outcome.gain()}"
    )
    lines += outcome.alignment.key_figures() + outcome.stages.key_figures()
    for shape in dict.fromkeys(head.shape for head in outcome.heads):
        figures = [
            f"{head.method} {head.milliseconds:,.0f} ms{memory_text(head)}"
            for head in outcome.heads
            if head.shape == shape
        ]
        lines.append(f"Head at {shape}: {'; '.join(figures)}")
    return lines


def write(outcome: Outcome) -> None:
    """Write report.md and the plots beside it."""
    for stage, title in STAGES.items():
        plot(outcome.curves[stage], title, outcome.folder / f"{stage}.png")
    outcome.alignment.plot(outcome.folder)
    (outcome.folder / "report.md").write_text("\n".join(_lines(outcome)) + "\n", encoding="utf-8")


TEXT_NOTE = """\
Text: {train:,} movie-review sentences to train on and {held_out:,} held out. NLL is in nats per token, over
every token of a sentence and its EOS; sentences packed into a row do not see each other.
"""
SAMPLES_NOTE = """\
Held-out prompts, completed before and after SFT: greedily, and sampled at temperature {temperature} (no
top-k, no top-p).
"""
SENTIMENT_NOTE = """\
VADER's compound score, in [-1, 1], of {prompts} sampled completions, without their prompts: mean and standard
error. Both models are given the same prompts and the same seed; completions.jsonl has all of it.
"""
HEAD_NOTE = """\
Mean cross-entropy from hidden states [N, H] and weight [V, H], forward and backward, fp32, on the CPU, of
random inputs whose logits have the standard deviation 2. The first shape is a step of this demo. Time: the
median of interleaved rounds. Peak memory: beyond the inputs, in a process of its own, gradients included.
Error: the largest one of the gradients against fp64, as a fraction of the largest gradient.
"""
AGAIN_NOTE = """\
The first command makes this report again, to the same figures but for times and memory; the others run one
stage each, from the rows and settings here.
"""


def _lines(outcome: Outcome) -> list[str]:
    seconds = [(part, f"{taken:.1f}") for part, taken in outcome.seconds.items()]
    sentiment = (outcome.sentiment("pretrain"), outcome.sentiment("sft"), outcome.gain())
    prompts = sum(done.stage == "sft" and done.mode == "sampled" for done in outcome.completions)
    lines = [
        "# fastalign demo",
        "",
        *(f"- {line}" for line in key_figures(outcome)),
        "",
        TEXT_NOTE.format_map(outcome.counts),
    ]
    for stage, title in STAGES.items():
        lines += [f"## {title}", "", f"![{title}]({stage}.png)", "", _summary(outcome, stage), ""]
    lines += ["## Samples", "", SAMPLES_NOTE.format(temperature=TEMPERATURE)]
    lines += [*table(("prompt", "mode", "before SFT", "after SFT"), sample_rows(outcome.completions)), ""]
    lines += ["## Sentiment", "", SENTIMENT_NOTE.format(prompts=prompts)]
    lines += [*table(("before SFT", "after SFT", "gain, prompt by prompt"), [sentiment]), ""]
    lines += outcome.alignment.report() + outcome.stages.report()
    lines += ["## This head and plain PyTorch", "", HEAD_NOTE]
    lines += [
        *table(
            ("shape", "method", "time, ms", "peak, MiB", "of it gradients, MiB", "error"),
            head_rows(outcome.heads),
        ),
        "",
    ]
    lines += [
        "## Time and machine",
        "",
        *table(("part", "seconds"), [*seconds, ("together", f"{sum(outcome.seconds.values()):.1f}")]),
        "",
    ]
    packages = {package: version(package) for package in ("transformers", "tokenizers", "vaderSentiment")}
    lines += [*table(("machine", ""), [*machine().items(), *packages.items()]), ""]
    return [*lines, "## Again", "", "```sh", *_commands(outcome), "```", "", AGAIN_NOTE.rstrip()]


def _summary(outcome: Outcome, stage: str) -> str:
    curve, prefix = outcome.curves[stage], "" if stage == "pretrain" else "sft_"
    what = (
        "sentences"
        if stage == "pretrain"
        else "positively rated sentences, of which the continuation is trained"
    )
    (_, before), (steps, after) = curve.held_out[0], curve.held_out[-1]
    return (
        f"{outcome.counts[prefix + 'train']:,} {what}, and {outcome.counts[prefix + 'held_out']:,} held "
        f"out. {steps} steps in {outcome.seconds[STAGES[stage]]:.1f} s; held-out NLL {before:.3f} -> "
        f"{after:.3f}. All settings: {stage}/config.yaml."
    )


def _commands(outcome: Outcome) -> list[str]:
    folder = outcome.folder
    again = [
        "fastalign",
        "demo",
        "--output-dir",
        str(folder),
        "--steps",
        str(outcome.steps),
        "--seed",
        str(outcome.seed),
    ]
    again += ["--threads", str(outcome.threads), *(["--data", str(outcome.data)] if outcome.data else [])]
    runs = [*STAGES, *outcome.alignment.lines]  # each is named after its stage, and what sets it apart
    alone = [
        [
            "fastalign",
            run.split("-")[0],
            "--config",
            f"{folder}/{run}/config.yaml",
            f"output_dir={folder}-{run}",
        ]
        for run in runs
    ]
    # `fastalign demo` sets the number of threads itself. Rounding, and so the last digits, depend on it.
    return [
        shlex.join(again),
        *(f"OMP_NUM_THREADS={outcome.threads} {shlex.join(command)}" for command in alone),
    ]


def sample_rows(completions: Sequence[Completion]) -> list[tuple[str, str, str, str]]:
    """Cells of the table of samples: each greedily completed prompt, in both modes, before and after SFT."""
    found = {(done.stage, done.mode, done.prompt): done.text for done in completions}
    shown = [done.prompt for done in completions if done.mode == "greedy" and done.stage == "pretrain"]
    return [
        (prompt, mode, found["pretrain", mode, prompt], found["sft", mode, prompt])
        for prompt in shown
        for mode in ("greedy", "sampled")
    ]
