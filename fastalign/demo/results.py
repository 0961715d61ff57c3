"""Results of the demo: completions, curves and means, and Markdown tables of them."""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

TEMPERATURE = 0.7  # of the sampled completions
SHOWN = 6  # prompts whose completions the report shows
STAGES = {"pretrain": "Pre-training", "sft": "SFT"}


class Completion(NamedTuple):
    """A completion by a stage's model, greedy or sampled, with VADER's compound sentiment in [-1, 1].

    `mode` is "greedy" or "sampled".
    """

    stage: str
    mode: str
    prompt: str
    text: str
    sentiment: float


class Curve(NamedTuple):
    """Loss in nats per token: (step, on the step's batch) and (step, on the held-out rows)."""

    training: list[tuple[int, float]]
    held_out: list[tuple[int, float]]


class Mean(NamedTuple):
    """A mean with its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.error:.3f}"


def mean(values: Sequence[float]) -> Mean:
    """The mean of at least two independent values, with the standard error √(s²/n)."""
    return Mean(statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)))


def read_curve(path: Path) -> Curve:
    """The losses in a run's metrics.jsonl."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    training = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    return Curve(training, [(line["step"], line["eval/nll"]) for line in lines if "eval/nll" in line])


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return [
        "| " + " | ".join(str(cell).strip().replace("|", "\\|").replace("\n", " ") for cell in line) + " |"
        for line in lines
    ]
