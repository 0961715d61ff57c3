"""Does tail_eps train as well as the exact gradient? `python -m bench.experiments.tail_training`: half an hour on one
busy core, a results file.

    python -m bench.experiments.tail_training --data vaderSentiment-0.5.zip --seeds 2
    python -m bench.experiments.tail_tables     # tables and plot of docs/tail.md, from the file that the page names

Four settings, every one exact, with tail_eps and with the small columns dropped without compensation, for
several seeds:

    pre-training   the demo's Llama from scratch on its movie-review sentences, but with 8192 tokens of vocabulary, so that a tail exists
                   and again with SmolLM2's 49152 tokens, where 2^-14 lies above 1 / V
    fine-tuning    the exact model of the same seed on continuations of positive sentences
    SmolLM2-135M   the last layer and the head of a real model on positive sentences (bench/experiments/tail_smollm2.py)

Final held-out NLLs, curves and kept shares go to bench/results/tail-training-<date>.json, which is written
anew after every run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from fastalign.demo import recipes
from fastalign.demo.sentences import (
    CHAT_TEMPLATE,
    POSITIVE,
    Sentence,
    chats_of,
    fetch,
    read_sentences,
    split,
    texts_of,
    write_rows,
)
from fastalign.demo.settings import RECIPE, ROW_TOKENS
from fastalign.measure import machine
from fastalign.stages import pretrain, sft
from fastalign.stages.tokenizer import train_tokenizer
from fastalign_kernels import tail_report
from fastalign_kernels.linear import accumulate as gradients

from ..core import smollm2
from ..core.operation import Absent
from . import tail_smollm2

RESULTS = Path(__file__).parents[1] / "results"
POWERS = (-8, -10, -12, -14, -16)  # tail_eps = 2 ** power, of the error meter
REPORT_TOKENS = 1024
EVALUATIONS = 4  # of a run, besides the one before the first step
POINTS = 24  # of a curve


PARTS = {  # what can be run apart, and the settings and reports that it makes
    "toy": ("pre-training", "fine-tuning", "untrained", "pre-trained"),
    "wide": ("pre-training, V 49152",),
    "smollm2": ("SmolLM2-135M",),
}
WIDE_HELD_OUT = 200  # sentences: a head of 49152 tokens makes evaluations dear


class Way(NamedTuple):
    """How the head's gradient is made."""

    tail_eps: float | None
    compensated: bool = True


WAYS = {"exact": Way(None), "2^-14": Way(2**-14), "2^-12": Way(2**-12), "2^-12 dropped": Way(2**-12, False)}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run depends on besides the code; tests make it smaller."""

    data: Path | None = None
    seeds: int = 3
    vocabulary: int = 8192
    held_out: int = 1000
    steps: int = 200
    sft_steps: int = 72
    wide_steps: int = 48
    smollm2_steps: int = 24
    parts: tuple[str, ...] = tuple(PARTS)
    learning_rate: float = 3e-3
    sft_learning_rate: float = 1e-3


@contextlib.contextmanager
def gradient(way: Way) -> Any:
    """A way that does not compensate leaves the dropped columns' gradient zero, as filters that only skip do;
    no option does that."""
    if way.compensated:
        yield
        return
    with mock.patch.object(
        gradients, "dropped_grad", lambda totals, coefficients: torch.zeros_like(coefficients[0])
    ):
        yield


Note = Callable[[str, str, int, dict[str, Any]], None]  # setting, way, seed, curves


def run(settings: Settings, folder: Path, output: Path, ways: dict[str, Way] = WAYS) -> dict[str, Any]:
    """The parts asked for, in `folder`; returns what the results file `output` holds, where other parts of an
    earlier call stay."""
    results: dict[str, Any] = {"runs": [], "reports": [], "seconds": {}}
    if output.exists():
        results |= json.loads(output.read_text())
        own = {setting for part in settings.parts for setting in PARTS[part]}
        results["runs"] = [done for done in results["runs"] if done["setting"] not in own]
        results["reports"] = [done for done in results["reports"] if done["model"] not in own]
    results |= {
        "machine_info": machine(),
        "versions": {package: version(package) for package in ("transformers", "tokenizers")},
        "settings": {
            name: value
            for name, value in dataclasses.asdict(settings).items()
            if name not in ("data", "parts")
        },
    }

    def note(kind: str, *entries: dict[str, Any]) -> None:
        results[kind].extend(entries)
        output.write_text(json.dumps(results) + "\n")

    def note_run(setting: str, name: str, seed: int, curves: dict[str, Any]) -> None:
        means = {curve: smoothed(curves[curve]) for curve in ("loss", "kept_share")}
        note("runs", {"setting": setting, "way": name, "seed": seed, **curves, **means})

    train, held_out = split(read_sentences(settings.data or fetch(folder)), settings.held_out)
    write_rows(folder / "train.jsonl", texts_of(train))
    for part in settings.parts:
        began = time.perf_counter()
        try:
            if part == "toy":
                note("reports", *toy(settings, folder, ways, train, held_out, note_run))
            elif part == "wide":
                wide(settings, folder, ways, held_out, note_run)
            else:
                note("reports", *smollm2_part(settings, ways, train, held_out, note_run))
        except Absent as reason:
            print(f"{part} is left out: {reason}", flush=True)
        results["seconds"][part] = time.perf_counter() - began
        note("runs")
    return results


def toy(
    settings: Settings,
    folder: Path,
    ways: dict[str, Way],
    train: list[Sentence],
    held_out: list[Sentence],
    note: Note,
) -> list[dict[str, Any]]:
    """Pre-training and fine-tuning with a tokenizer of the sentences; the error meter before and after the
    first exact run."""
    tokenizer = train_tokenizer(
        [sentence.text for sentence in train], settings.vocabulary, chat_template=CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    write_rows(folder / "held_out.jsonl", texts_of(held_out))
    for name, part in (("train", train), ("held_out", held_out)):
        write_rows(folder / f"sft_{name}.jsonl", chats_of(part, tokenizer))
    for seed in range(settings.seeds):
        for name, way in ways.items():
            with gradient(way):
                pretrain.run(pretrain_config(settings, folder, name, way, seed))
            note("pre-training", name, seed, read_curves(folder / f"pretrain-{name}-{seed}"))
        for name, way in ways.items():
            with gradient(way):
                sft.run(sft_config(settings, folder, name, way, seed))
            note("fine-tuning", name, seed, read_curves(folder / f"sft-{name}-{seed}"))
    trained = folder / "pretrain-exact-0" / "model"
    text = " ".join(sentence.text for sentence in held_out)
    found = (
        reports(model, trained, weights, tokenizer, text)
        for model, weights in (("untrained", None), ("pre-trained", trained))
    )
    return [report for own in found for report in own]


def wide(
    settings: Settings, folder: Path, ways: dict[str, Way], held_out: list[Sentence], note: Note
) -> None:
    """Pre-training with SmolLM2's tokenizer: 1 / V is 2^-15.6 there, so that 2^-14 drops columns from the
    first step on."""
    own = folder / "wide"
    own.mkdir()
    AutoTokenizer.from_pretrained(**smollm2.files()).save_pretrained(own / "tokenizer")
    write_rows(own / "held_out.jsonl", texts_of(held_out[:WIDE_HELD_OUT]))
    shutil.copy(folder / "train.jsonl", own)
    fewer = dataclasses.replace(settings, steps=settings.wide_steps)
    for seed in range(settings.seeds):
        for name, way in ways.items():
            with gradient(way):
                pretrain.run(pretrain_config(fewer, own, name, way, seed))
            note("pre-training, V 49152", name, seed, read_curves(own / f"pretrain-{name}-{seed}"))


def smollm2_part(
    settings: Settings, ways: dict[str, Way], train: list[Sentence], held_out: list[Sentence], note: Note
) -> list[dict[str, Any]]:
    """Fine-tuning of the real model's last layer and head; the error meter before."""
    positive = [
        "\n".join(sentence.text for sentence in part if sentence.rating >= POSITIVE)
        for part in (train, held_out)
    ]
    real = tail_smollm2.prepare(positive[0], positive[1], settings.smollm2_steps)
    found = of_head("SmolLM2-135M", *tail_smollm2.text_head(REPORT_TOKENS))
    for seed in range(settings.seeds):
        for name, way in ways.items():
            with gradient(way):
                curves = tail_smollm2.tune(real, way.tail_eps, seed, settings.smollm2_steps)
            note("SmolLM2-135M", name, seed, curves)
    return found


def shared(settings: Settings, folder: Path, steps: int, way: Way, seed: int) -> dict[str, Any]:
    """What the configurations of both stages have in common: the demo's recipe."""
    options = {"max_steps": steps, "warmup_steps": min(20, steps), "eval_every": max(1, steps // EVALUATIONS)}
    return RECIPE | options | {"seed": seed, "tail_eps": way.tail_eps, "tokenizer": str(folder / "tokenizer")}


def pretrain_config(
    settings: Settings, folder: Path, name: str, way: Way, seed: int
) -> pretrain.PretrainConfig:
    return pretrain.PretrainConfig(
        train_data=str(folder / "train.jsonl"),
        eval_data=str(folder / "held_out.jsonl"),
        output_dir=str(folder / f"pretrain-{name}-{seed}"),
        model_config=recipes.MODEL,
        sequence_length=ROW_TOKENS,
        learning_rate=settings.learning_rate,
        **shared(settings, folder, settings.steps, way, seed),
    )


def sft_config(settings: Settings, folder: Path, name: str, way: Way, seed: int) -> sft.SFTConfig:
    return sft.SFTConfig(
        train_data=str(folder / "sft_train.jsonl"),
        eval_data=str(folder / "sft_held_out.jsonl"),
        model=str(folder / f"pretrain-exact-{seed}" / "model"),
        output_dir=str(folder / f"sft-{name}-{seed}"),
        max_length=ROW_TOKENS,
        packing=True,
        learning_rate=settings.sft_learning_rate,
        **shared(settings, folder, settings.sft_steps, way, seed),
    )


def read_curves(folder: Path) -> dict[str, Any]:
    """(step, value) of a stage's run, and its median seconds a step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = {"loss": "nll", "held_out": "eval/nll", "kept_share": "kept_share"}
    curves: dict[str, Any] = {
        name: [(line["step"], line[key]) for line in lines if key in line] for name, key in names.items()
    }
    return curves | {
        "median_step_seconds": statistics.median(line["seconds"] for line in lines if "seconds" in line)
    }


def smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Means over spans of equal length, at the last step of each: a batch's loss is noisy, and the file stays
    small."""
    length = max(1, len(points) // POINTS)
    spans = (points[first : first + length] for first in range(0, len(points), length))
    return [(span[-1][0], statistics.fmean(value for _, value in span)) for span in spans]


def reports(
    model: str, architecture: Path, weights: Path | None, tokenizer: PreTrainedTokenizerFast, text: str
) -> list[dict[str, Any]]:
    """The error meter on held-out text, of a model as it is initialised (weights None) or trained."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(architecture)
    lm = (
        AutoModelForCausalLM.from_config(config)
        if weights is None
        else AutoModelForCausalLM.from_pretrained(weights)
    )
    ids = torch.tensor(tokenizer.encode(text))[: REPORT_TOKENS + ROW_TOKENS]
    ids = ids[: ids.numel() // ROW_TOKENS * ROW_TOKENS].view(-1, ROW_TOKENS)
    with torch.no_grad():
        hidden = lm.model(ids).last_hidden_state[:, :-1]
    return of_head(model, hidden.flatten(0, 1), lm.lm_head.weight.detach(), ids[:, 1:].flatten())


def of_head(
    model: str, hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor
) -> list[dict[str, Any]]:
    """`tail_report` at every power."""
    found = (
        (power, tail_report(hidden, weight, ids, tail_eps=2.0**power, sample=REPORT_TOKENS))
        for power in POWERS
    )
    return [
        {"model": model, "vocabulary": weight.shape[0], "power": power, **report._asdict()}
        for power, report in found
    ]


def main(argv: Sequence[str] | None = None) -> None:
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m bench.experiments.tail_training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, help="a copy of the sentences in place of fetching them")
    parser.add_argument("--seeds", type=int, default=defaults.seeds, help=f"default: {defaults.seeds}")
    parser.add_argument(
        "--steps", type=int, default=defaults.steps, help=f"of pre-training; default: {defaults.steps}"
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        help="others of the results file stay as they are",
    )
    parser.add_argument("--output", type=Path, help="default: bench/results/tail-training-<date>.json")
    given = parser.parse_args(argv)
    output = given.output or RESULTS / f"tail-training-{datetime.date.today().isoformat()}.json"
    # One thread: two were measured 3 to 8 times slower on a small shared machine.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run(
            Settings(given.data, given.seeds, steps=given.steps, parts=tuple(given.parts)),
            Path(folder),
            output,
        )
    print(f"results: {output}")


if __name__ == "__main__":
    main()
