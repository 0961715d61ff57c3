"""Does tail_eps train as well as the exact gradient? Half an hour on one busy core writes a results file.

    python -m bench.experiments.tail_training --data vaderSentiment-0.5.zip --seeds 2
    python -m bench.experiments.tail_tables     # tables and plot of docs/tail.md, from the file that it names

Four settings, for several seeds. Each trains with exact gradients, with tail_eps, and with the small columns
dropped without compensation:

    pre-training   the demo's Llama from scratch on its movie-review sentences, with a vocabulary of 8192, so
                   that a tail exists; and again with SmolLM2's 49152, where 2^-14 lies above 1 / V
    fine-tuning    the exact model of the same seed on continuations of positive sentences
    SmolLM2-135M   the last layer and the head of a real model on positive sentences (tail_smollm2.py); and
                   by SFT and DPO with `screen`, beside exact alone

Final held-out NLLs, curves and kept shares go to bench/results/tail-training-<date>.json. The file is written
after every run.
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
POWERS = (-8, -10, -12, -14, -16)  # tail_eps = 2 ** power for `tail_report`
REPORT_TOKENS = 1024
EVALUATIONS = 4  # in a run, and one more before the first step
POINTS = 24  # of a curve
PARTS = {  # parts that run separately, and the settings and reports of each
    "toy": ("pre-training", "fine-tuning", "untrained", "pre-trained"),
    "wide": ("pre-training, V 49152",),
    "smollm2": ("SmolLM2-135M",),
    "screen": ("SmolLM2-135M, SFT", "SmolLM2-135M, DPO"),  # docs/screen.md
}
WIDE_HELD_OUT = 200  # sentences, because evaluations are slow with a head of 49152 tokens


class GradMode(NamedTuple):
    """How the head computes its gradient."""

    tail_eps: float | None
    compensated: bool = True
    screen: bool | None = None


MODES = {
    "exact": GradMode(None),
    "2^-14": GradMode(2**-14),
    "2^-12": GradMode(2**-12),
    "2^-12 dropped": GradMode(2**-12, compensated=False),
}
SCREENED = {"exact": GradMode(None), "screen, 2^-14": GradMode(2**-14, screen=True)}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run depends on; tests make it smaller."""

    data: Path | None = None
    seeds: int = 3
    vocabulary: int = 8192
    held_out: int = 1000
    steps: int = 200
    sft_steps: int = 72
    wide_steps: int = 48
    smollm2_steps: int = 24
    screen_steps: int = 16
    parts: tuple[str, ...] = tuple(PARTS)
    learning_rate: float = 3e-3
    sft_learning_rate: float = 1e-3


@contextlib.contextmanager
def gradient(mode: GradMode) -> Any:
    """Train in this mode. Without compensation, which no option offers, dropped columns get no gradient."""
    if mode.compensated:
        yield
        return
    with mock.patch.object(
        gradients, "dropped_grad", lambda totals, coefficients: torch.zeros_like(coefficients[0])
    ):
        yield


Note = Callable[[str, str, int, dict[str, Any]], None]  # takes setting, mode, seed and curves


def run(settings: Settings, folder: Path, output: Path, modes: dict[str, GradMode] = MODES) -> dict[str, Any]:
    """Run the settings' parts in `folder` and return the content of the results file `output`.

    Parts of an earlier call that do not run again stay in the file.
    """
    results: dict[str, Any] = {"runs": [], "reports": [], "seconds": {}}
    if output.exists():
        results |= json.loads(output.read_text())
        replaced = {setting for part in settings.parts for setting in PARTS[part]}
        results["runs"] = [done for done in results["runs"] if done["setting"] not in replaced]
        results["reports"] = [done for done in results["reports"] if done["model"] not in replaced]
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
                note("reports", *toy(settings, folder, modes, train, held_out, note_run))
            elif part == "wide":
                wide(settings, folder, modes, held_out, note_run)
            elif part == "screen":
                screen_part(settings, train, held_out, note_run)
            else:
                note("reports", *smollm2_part(settings, modes, train, held_out, note_run))
        except Absent as reason:
            print(f"{part} is left out: {reason}", flush=True)
        results["seconds"][part] = time.perf_counter() - began
        note("runs")
    return results


def toy(
    settings: Settings,
    folder: Path,
    modes: dict[str, GradMode],
    train: list[Sentence],
    held_out: list[Sentence],
    note: Note,
) -> list[dict[str, Any]]:
    """Pre-train and fine-tune on the sentences; reports before and after the first exact run."""
    tokenizer = train_tokenizer(
        [sentence.text for sentence in train], settings.vocabulary, chat_template=CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    write_rows(folder / "held_out.jsonl", texts_of(held_out))
    for name, part in (("train", train), ("held_out", held_out)):
        write_rows(folder / f"sft_{name}.jsonl", chats_of(part, tokenizer))
    for seed in range(settings.seeds):
        for name, mode in modes.items():
            with gradient(mode):
                pretrain.run(pretrain_config(settings, folder, name, mode, seed))
            note("pre-training", name, seed, read_curves(folder / f"pretrain-{name}-{seed}"))
        for name, mode in modes.items():
            with gradient(mode):
                sft.run(sft_config(settings, folder, name, mode, seed))
            note("fine-tuning", name, seed, read_curves(folder / f"sft-{name}-{seed}"))
    trained = folder / "pretrain-exact-0" / "model"
    text = " ".join(sentence.text for sentence in held_out)
    found = (
        reports(model, trained, weights, tokenizer, text)
        for model, weights in (("untrained", None), ("pre-trained", trained))
    )
    return [report for model_reports in found for report in model_reports]


def wide(
    settings: Settings, folder: Path, modes: dict[str, GradMode], held_out: list[Sentence], note: Note
) -> None:
    """Pre-train with SmolLM2's tokenizer. 1 / V is 2^-15.6, so 2^-14 drops columns from the first step on."""
    local = folder / "wide"
    local.mkdir()
    AutoTokenizer.from_pretrained(**smollm2.files()).save_pretrained(local / "tokenizer")
    write_rows(local / "held_out.jsonl", texts_of(held_out[:WIDE_HELD_OUT]))
    shutil.copy(folder / "train.jsonl", local)
    fewer = dataclasses.replace(settings, steps=settings.wide_steps)
    for seed in range(settings.seeds):
        for name, mode in modes.items():
            with gradient(mode):
                pretrain.run(pretrain_config(fewer, local, name, mode, seed))
            note("pre-training, V 49152", name, seed, read_curves(local / f"pretrain-{name}-{seed}"))


def smollm2_part(
    settings: Settings,
    modes: dict[str, GradMode],
    train: list[Sentence],
    held_out: list[Sentence],
    note: Note,
) -> list[dict[str, Any]]:
    """Fine-tune the real model's last layer and head; reports before."""
    real = _prepare(train, held_out, settings.smollm2_steps)
    found = of_head("SmolLM2-135M", *tail_smollm2.text_head(REPORT_TOKENS))
    for seed in range(settings.seeds):
        for name, mode in modes.items():
            with gradient(mode):
                curves = tail_smollm2.tune(real, mode.tail_eps, seed, settings.smollm2_steps, mode.screen)
            note("SmolLM2-135M", name, seed, curves)
    return found


def _prepare(train: list[Sentence], held_out: list[Sentence], steps: int) -> tail_smollm2.Frozen:
    """SmolLM2 on the positive sentences."""
    texts = [
        "\n".join(sentence.text for sentence in part if sentence.rating >= POSITIVE)
        for part in (train, held_out)
    ]
    return tail_smollm2.prepare(texts[0], texts[1], steps)


def screen_part(settings: Settings, train: list[Sentence], held_out: list[Sentence], note: Note) -> None:
    """The real model's last layer and head by SFT and by DPO, with exact and with screened logits."""
    steps = settings.screen_steps
    real = _prepare(train, held_out, steps)
    pairs = tail_smollm2.prepare_pairs(real)
    for seed in range(settings.seeds):
        for name, mode in SCREENED.items():
            curves = tail_smollm2.tune(real, mode.tail_eps, seed, steps, mode.screen)
            note("SmolLM2-135M, SFT", name, seed, curves)
            curves = tail_smollm2.tune_pairs(pairs, mode.tail_eps, seed, steps, mode.screen)
            note("SmolLM2-135M, DPO", name, seed, curves)


def shared(folder: Path, steps: int, mode: GradMode, seed: int) -> dict[str, Any]:
    """The fields that both stages share: the demo's recipe."""
    options = {"max_steps": steps, "warmup_steps": min(20, steps), "eval_every": max(1, steps // EVALUATIONS)}
    return (
        RECIPE
        | options
        | {"seed": seed, "tail_eps": mode.tail_eps, "screen": bool(mode.screen)}
        | {"tokenizer": str(folder / "tokenizer")}
    )


def pretrain_config(
    settings: Settings, folder: Path, name: str, mode: GradMode, seed: int
) -> pretrain.PretrainConfig:
    return pretrain.PretrainConfig(
        train_data=str(folder / "train.jsonl"),
        eval_data=str(folder / "held_out.jsonl"),
        output_dir=str(folder / f"pretrain-{name}-{seed}"),
        model_config=recipes.MODEL,
        sequence_length=ROW_TOKENS,
        learning_rate=settings.learning_rate,
        **shared(folder, settings.steps, mode, seed),
    )


def sft_config(settings: Settings, folder: Path, name: str, mode: GradMode, seed: int) -> sft.SFTConfig:
    return sft.SFTConfig(
        train_data=str(folder / "sft_train.jsonl"),
        eval_data=str(folder / "sft_held_out.jsonl"),
        model=str(folder / f"pretrain-exact-{seed}" / "model"),
        output_dir=str(folder / f"sft-{name}-{seed}"),
        max_length=ROW_TOKENS,
        packing=True,
        learning_rate=settings.sft_learning_rate,
        **shared(folder, settings.sft_steps, mode, seed),
    )


def read_curves(folder: Path) -> dict[str, Any]:
    """The curves of a stage's run as (step, value), and its median seconds a step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = {"loss": "nll", "held_out": "eval/nll", "kept_share": "kept_share"}
    curves: dict[str, Any] = {
        name: [(line["step"], line[key]) for line in lines if key in line] for name, key in names.items()
    }
    return curves | {
        "median_step_seconds": statistics.median(line["seconds"] for line in lines if "seconds" in line)
    }


def smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Means over spans of equal length, each at its last step: less noise, and a small file."""
    length = max(1, len(points) // POINTS)
    spans = (points[first : first + length] for first in range(0, len(points), length))
    return [(span[-1][0], statistics.fmean(value for _, value in span)) for span in spans]


def reports(
    model: str, architecture: Path, weights: Path | None, tokenizer: PreTrainedTokenizerFast, text: str
) -> list[dict[str, Any]]:
    """`tail_report` on held-out text of a model as it is initialised (weights None) or trained."""
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
    parser.add_argument("--data", type=Path, help="a copy of the sentences (default: fetch them)")
    parser.add_argument("--seeds", type=int, default=defaults.seeds, help=f"default: {defaults.seeds}")
    parser.add_argument(
        "--steps", type=int, default=defaults.steps, help=f"of pre-training; default: {defaults.steps}"
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        help="parts to run; the rest of the results file stays as it is",
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
