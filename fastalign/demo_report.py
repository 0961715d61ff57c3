"""The demo's report: curves, samples, sentiment, and this library beside plain PyTorch."""

import json
import math
import shlex
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from fastalign_kernels import linear_cross_entropy

from .measure import PeakMemoryUnavailable, interleaved, largest_error, machine, peak_memory

if TYPE_CHECKING:
    from .demo_align import Alignment
    from .demo_steps import SideBySide

LossFn = Callable[[Tensor, Tensor, Tensor], Tensor]
TEMPERATURE = 0.7  # of the sampled completions
SHOWN = 6  # prompts whose completions the report shows
STAGES = {"pretrain": "Pre-training", "sft": "SFT"}


class Shape(NamedTuple):
    """A head: N tokens, hidden size H, vocabulary V."""

    N: int
    H: int
    V: int

    def __str__(self) -> str:
        return f"N {self.N}, H {self.H}, V {self.V}"


SHAPES = (Shape(1152, 128, 2048), Shape(2048, 576, 49152))  # a step of the demo; the head of SmolLM2-135M
ROUNDS = (3, 20)  # of timing, at least and at most
SECONDS = 20.0  # for the rounds of a shape
ROWS_AT_ONCE = 256  # of the fp64 reference


def plain_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy as PyTorch code has it: full logits."""
    return F.cross_entropy(F.linear(hidden, weight), targets)


METHODS: dict[str, LossFn] = {"fastalign": linear_cross_entropy, "plain PyTorch": plain_cross_entropy}


class Head(NamedTuple):
    """One method at one shape, forward and backward; what could not be measured is None.

    milliseconds: median. peak_mib: beyond the inputs, gradients included. error: of the gradients, as
    `measure_heads` has it.
    """

    shape: Shape
    method: str
    milliseconds: float
    peak_mib: float | None
    error: float


class Completion(NamedTuple):
    """What a stage's model made of a prompt, greedily or sampled, and VADER's compound sentiment of that, in
    [-1, 1]."""

    stage: str
    way: str
    prompt: str
    text: str
    sentiment: float


class Curve(NamedTuple):
    """Loss in nats per token: (step, of the step's batch) and (step, of the held-out rows)."""

    training: list[tuple[int, float]]
    held_out: list[tuple[int, float]]


class Mean(NamedTuple):
    """A mean with its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.error:.3f}"


@dataclass(frozen=True)
class Outcome:
    """Everything the report tells of a run."""

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
        return [own.sentiment for own in self.completions if own.stage == stage and own.way == "sampled"]


def mean(values: Sequence[float]) -> Mean:
    """The mean of at least two independent values, with the standard error √(s²/n)."""
    return Mean(statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)))


def read_curve(path: Path) -> Curve:
    """The losses in a run's metrics.jsonl."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    training = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    return Curve(training, [(line["step"], line["eval/nll"]) for line in lines if "eval/nll" in line])


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


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return [
        "| " + " | ".join(str(cell).strip().replace("|", "\\|").replace("\n", " ") for cell in line) + " |"
        for line in lines
    ]


def head_step(method: str, shape: Sequence[int]) -> Callable[[], dict[str, Tensor]]:
    """The forward and backward pass of a method on the inputs of a shape, as a call that returns the
    gradients."""
    return partial(_gradients, METHODS[method], *_head_inputs(Shape(*shape)))


def _head_inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(shape.N, shape.H, generator=generator)
    weight = torch.randn(shape.V, shape.H, generator=generator) * (
        2 / math.sqrt(shape.H)
    )  # logits of standard deviation 2
    return (
        hidden.requires_grad_(),
        weight.requires_grad_(),
        torch.randint(shape.V, (shape.N,), generator=generator),
    )


def _gradients(loss_fn: LossFn, hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(loss_fn(hidden, weight, targets), (hidden, weight))
    return dict(zip(("hidden", "weight"), gradients, strict=True))


def _true_gradients(shape: Shape) -> dict[str, Tensor]:
    """Plain PyTorch in fp64, some tokens at a time."""
    hidden, weight, targets = _head_inputs(shape)
    wide = weight.detach().double().requires_grad_()
    total, parts = torch.zeros_like(wide), []
    for begin in range(0, shape.N, ROWS_AT_ONCE):
        rows = slice(begin, begin + ROWS_AT_ONCE)
        own = _gradients(
            plain_cross_entropy, hidden[rows].detach().double().requires_grad_(), wide, targets[rows]
        )
        share = targets[rows].numel() / shape.N  # of the mean over all tokens
        parts.append(own["hidden"] * share)
        total.add_(own["weight"], alpha=share)
    return {"hidden": torch.cat(parts), "weight": total}


def measure_heads(shape: Shape) -> list[Head]:
    """Each method at a shape: time in interleaved rounds, memory in a process of its own, gradients against
    plain PyTorch in fp64.

    The error is the largest elementwise one, as a fraction of the largest gradient: of hidden states and
    weight, the worse.
    """
    steps = {method: head_step(method, shape) for method in METHODS}
    began = time.perf_counter()
    found = {
        method: step() for method, step in steps.items()
    }  # the warm-up too, which tells how many rounds fit
    rounds = int(SECONDS / (time.perf_counter() - began))
    timings = interleaved(steps, rounds=min(max(rounds, ROUNDS[0]), ROUNDS[1]), warmup=0)
    true = _true_gradients(shape)
    errors = {
        method: max(error.relative for error in largest_error(own, true).values())
        for method, own in found.items()
    }
    return [
        Head(shape, method, 1000 * timings[method].median, _peak_mib(method, shape), errors[method])
        for method in METHODS
    ]


def _peak_mib(method: str, shape: Shape) -> float | None:
    call, small = {"method": method, "shape": list(shape)}, {"method": method, "shape": [8, 8, 8]}
    try:
        return peak_memory("fastalign.demo_report:head_step", call, warmup=small)
    except PeakMemoryUnavailable:
        return None


def head_rows(heads: Iterable[Head]) -> list[list[str]]:
    """Cells of the table of heads."""
    rows = []
    for own in heads:
        peak = "not measured: needs Linux" if own.peak_mib is None else f"{own.peak_mib:,.1f}"
        gradients = (own.shape.N + own.shape.V) * own.shape.H * 4 / 2**20
        rows.append(
            [
                str(own.shape),
                own.method,
                f"{own.milliseconds:,.1f}",
                peak,
                f"{gradients:,.1f}",
                f"{own.error:.1e}",
            ]
        )
    return rows


def key_figures(outcome: Outcome) -> list[str]:
    """The run in a few lines."""
    lines = []
    for stage, title in STAGES.items():
        held_out = outcome.curves[stage].held_out
        what = "sentences" if stage == "pretrain" else "continuations of positive sentences"
        lines.append(
            f"{title}: held-out NLL of {what} {held_out[0][1]:.3f} -> {held_out[-1][1]:.3f} nats per token in {held_out[-1][0]} steps"
        )
    lines.append(
        f"Sentiment of sampled completions: {outcome.sentiment('pretrain')} before SFT, {outcome.sentiment('sft')} after; "
        f"gain {outcome.gain()}"
    )
    lines += outcome.alignment.key_figures() + outcome.stages.key_figures()
    for shape in dict.fromkeys(own.shape for own in outcome.heads):
        own = [
            f"{head.method} {head.milliseconds:,.0f} ms{_memory(head)}"
            for head in outcome.heads
            if head.shape == shape
        ]
        lines.append(f"Head at {shape}: {'; '.join(own)}")
    return lines


def _memory(head: Head) -> str:
    return "" if head.peak_mib is None else f", {head.peak_mib:,.0f} MiB"


def write(outcome: Outcome) -> None:
    """Write report.md and the plots beside it."""
    for stage, title in STAGES.items():
        plot(outcome.curves[stage], title, outcome.folder / f"{stage}.png")
    outcome.alignment.plot(outcome.folder)
    (outcome.folder / "report.md").write_text("\n".join(_lines(outcome)) + "\n", encoding="utf-8")


TEXT_NOTE = """\
Text: {train:,} movie-review sentences to train on and {held_out:,} held out. NLL is in nats per token, over every token of a sentence and
its EOS; sentences packed into a row do not see each other.
"""
SAMPLES_NOTE = """\
Held-out prompts, completed before and after SFT: greedily, and sampled at temperature {temperature} (no top-k, no top-p).
"""
SENTIMENT_NOTE = """\
VADER's compound score, in [-1, 1], of {prompts} sampled completions, without their prompts: mean and standard error. Both models are given
the same prompts and the same seed; completions.jsonl has all of it.
"""
HEAD_NOTE = """\
Mean cross-entropy from hidden states [N, H] and weight [V, H], forward and backward, fp32, on the CPU, of random inputs
whose logits have the standard deviation 2. The first shape is a step of this demo. Time: the median of interleaved rounds. Peak memory:
beyond the inputs, in a process of its own, gradients included. Error: the largest one of the gradients against fp64, as a fraction of the
largest gradient.
"""
AGAIN_NOTE = """\
The first command makes this report again, to the same figures but for times and memory; the others run one stage each, from the rows and
settings here.
"""


def _lines(outcome: Outcome) -> list[str]:
    seconds = [(part, f"{own:.1f}") for part, own in outcome.seconds.items()]
    sentiment = (outcome.sentiment("pretrain"), outcome.sentiment("sft"), outcome.gain())
    prompts = sum(own.stage == "sft" and own.way == "sampled" for own in outcome.completions)
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
    lines += [*table(("prompt", "way", "before SFT", "after SFT"), sample_rows(outcome.completions)), ""]
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
        f"{outcome.counts[prefix + 'train']:,} {what}, and {outcome.counts[prefix + 'held_out']:,} held out. {steps} steps in "
        f"{outcome.seconds[STAGES[stage]]:.1f} s; held-out NLL {before:.3f} -> {after:.3f}. All settings: {stage}/config.yaml."
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
    # `fastalign demo` sets the number of threads itself; rounding, and so the figures' last digits, depend on
    # it.
    return [
        shlex.join(again),
        *(f"OMP_NUM_THREADS={outcome.threads} {shlex.join(command)}" for command in alone),
    ]


def sample_rows(completions: Sequence[Completion]) -> list[tuple[str, str, str, str]]:
    """Cells of the table of samples: of each prompt that was completed greedily, both ways, before and after
    SFT."""
    found = {(own.stage, own.way, own.prompt): own.text for own in completions}
    shown = [own.prompt for own in completions if own.way == "greedy" and own.stage == "pretrain"]
    return [
        (prompt, way, found["pretrain", way, prompt], found["sft", way, prompt])
        for prompt in shown
        for way in ("greedy", "sampled")
    ]
