"""`fastalign demo`: train, tune and align a small Llama on real text, on a CPU in minutes, and report.

    fastalign demo                                  # writes runs/demo/report.md
    fastalign demo --steps 800 --seed 1 --output-dir runs/longer

sentences.py gets 10,605 movie-review sentences. On all but 1,000 of them, this file trains a byte-level BPE
tokenizer and a language model, and tunes the model on prompt -> continuation of the positively rated ones.
alignment.py trains a reward model on the ratings, and policies by DPO, KTO, PPO and GRPO. stage_steps.py and
heads.py measure fastalign beside plain PyTorch, and report.py writes the report.
"""

import argparse
import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from ..data.errors import DataError
from ..faults import Parser, reporting
from ..stages import pretrain, sft
from ..stages.tokenizer import train_tokenizer
from . import report, stage_steps
from .alignment import PLOTS, align, load
from .completions import draw
from .heads import measure_heads
from .progress import bar, part
from .recipes import TITLES, pretrain_config, sft_config
from .report import Outcome
from .results import SHOWN, STAGES, TEMPERATURE, Completion, read_curve
from .sentences import (
    CHAT_TEMPLATE,
    chats_of,
    cut,
    fetch,
    prompts_of,
    rated_pairs,
    read_sentences,
    split,
    texts_of,
    write_rows,
)
from .settings import Settings

VOCABULARY = 2048
MARKER = "demo.json"  # marks a folder of the demo, whose contents a new run replaces
MADE = (
    "rows",
    "tokenizer",
    "reference",
    *STAGES,
    *TITLES,
    "report.md",
    "completions.jsonl",
    "samples.jsonl",
)
MADE += (*(f"{stage}.png" for stage in STAGES), *PLOTS)
THREADS_HELP = (
    "threads of torch (default: 1; on a small machine shared with anything else, "
    "torch with two threads was measured 3 to 8 times slower)"
)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line.

    If options or data are wrong, it ends with status 2 and a line that says so.
    """
    defaults = Settings()
    parser = Parser(
        prog="fastalign demo",
        description="Pre-training, SFT, a reward model, DPO, KTO, PPO and GRPO on real text at toy scale, "
        "with a report.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=defaults.output_dir,
        metavar="DIR",
        help=f"default: {defaults.output_dir}",
    )
    parser.add_argument(
        "--steps",
        type=_positive,
        default=defaults.steps,
        metavar="N",
        help=f"steps of pre-training (default: {defaults.steps})",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="a copy of the sentences (zip or txt) in place of fetching them",
    )
    parser.add_argument(
        "--seed", type=_natural, default=defaults.seed, metavar="N", help=f"default: {defaults.seed}"
    )
    parser.add_argument("--threads", type=_positive, default=defaults.threads, metavar="N", help=THREADS_HELP)
    settings = Settings(**vars(parser.parse_args(argv)))
    with reporting(parser.prog):
        prepared = prepare(settings)
        disable_progress_bar()  # bars of loading and saving would interrupt the demo's bars
        run(settings, prepared)


def _natural(text: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least {least}")
    return int(text)


def _positive(text: str) -> int:
    return _natural(text, least=1)


class Prepared(NamedTuple):
    """What a run starts from, and the seconds that preparing it took.

    `rows` are the rows of each file. `prompts` are prompts of held-out sentences, by which models are
    judged. `sampled` are other prompts, whose completions policies learn from.
    """

    tokenizer: PreTrainedTokenizerFast
    rows: dict[str, list[dict[str, Any]]]
    prompts: list[str]
    sampled: list[str]
    seconds: float


def prepare(settings: Settings) -> Prepared:
    """Claim the output folder, get the sentences and make rows of them.

    Nothing of an earlier demo is removed yet. Raises ValueError for a folder that holds anything but an
    earlier demo, and for sentences that cannot be fetched, read or used.
    """
    began = time.perf_counter()
    folder = settings.output_dir
    if folder.exists() and (
        not folder.is_dir() or (any(folder.iterdir()) and not (folder / MARKER).exists())
    ):
        raise ValueError(
            f"--output-dir: got {folder}, which holds files, expected a new folder or that of an earlier demo"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text(json.dumps(dataclasses.asdict(settings), default=str, indent=1) + "\n")
    source = settings.data or fetch(folder / "data")
    train, held_out = split(read_sentences(source), settings.held_out)
    tokenizer = train_tokenizer(
        [sentence.text for sentence in train], VOCABULARY, chat_template=CHAT_TEMPLATE
    )
    rows = {"train": texts_of(train), "held_out": texts_of(held_out)}
    rows |= {"sft_train": chats_of(train, tokenizer), "sft_held_out": chats_of(held_out, tokenizer)}
    cuts = [cut(tokenizer, sentence.text) for sentence in held_out]
    prompts = list(dict.fromkeys(parts[0] for parts in cuts if parts is not None))[: settings.prompts]
    if not rows["sft_train"] or not rows["sft_held_out"] or len(prompts) < 2:
        raise DataError(
            f"{source}: got {len(rows['sft_train'])} positively rated sentences to tune on, "
            f"{len(rows['sft_held_out'])} held out and {len(prompts)} prompts of at least 5 tokens with a "
            "continuation, expected at least 1, 1 and 2"
        )
    rows |= {
        "reward_train": rated_pairs(train, rounds=2, seed=settings.seed),
        "reward_held_out": rated_pairs(held_out, rounds=1, seed=0),
    }
    sampled = prompts_of(
        train,
        tokenizer,
        besides={parts[0] for parts in cuts if parts is not None},
        most=settings.sampled,
        seed=settings.seed,
    )
    if not rows["reward_train"] or not rows["reward_held_out"] or not sampled:
        raise DataError(
            f"{source}: got {len(rows['reward_train'])} pairs of positively and negatively rated sentences "
            f"to train on, {len(rows['reward_held_out'])} held out and {len(sampled)} prompts beside the "
            "held-out ones, expected at least 1 of each"
        )
    return Prepared(tokenizer, rows, prompts, sampled, time.perf_counter() - began)


def run(settings: Settings, prepared: Prepared) -> Outcome:
    """Train, tune, sample, measure and write report.md, in the folder that `prepare` claimed.

    Prints the key figures.
    """
    torch.set_num_threads(settings.threads)
    folder = settings.output_dir
    _clear(folder)
    prepared.tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "rows").mkdir()
    for name, rows in prepared.rows.items():
        write_rows(folder / "rows" / f"{name}.jsonl", rows)
    seconds = {"text and tokenizer": prepared.seconds}
    with part(STAGES["pretrain"], seconds):
        pretrain.run(pretrain_config(settings))
    with part(STAGES["sft"], seconds):
        sft.run(sft_config(settings))
    with part("completions", seconds):
        completions = complete(settings, prepared.tokenizer, prepared.prompts)
        write_rows(folder / "completions.jsonl", [completion._asdict() for completion in completions])
    aligned = align(settings, prepared.tokenizer, prepared.sampled, prepared.prompts, seconds)
    with part("a step of each stage beside plain PyTorch", seconds):
        measured = stage_steps.measure(folder)
    with part("this head beside plain PyTorch", seconds):
        heads = [head for shape in bar(settings.shapes, unit="shape") for head in measure_heads(shape)]
    whole = {run: seconds[title] for run, title in (STAGES | TITLES).items()}
    outcome = Outcome(
        folder=folder,
        data=settings.data,
        steps=settings.steps,
        seed=settings.seed,
        threads=settings.threads,
        counts={name: len(rows) for name, rows in prepared.rows.items()},
        seconds=seconds,
        curves={stage: read_curve(folder / stage / "metrics.jsonl") for stage in STAGES},
        completions=completions,
        alignment=aligned,
        stages=stage_steps.SideBySide(measured, whole, settings.policy_tokens, len(prepared.tokenizer)),
        heads=heads,
    )
    report.write(outcome)
    print("\n".join(report.key_figures(outcome)))
    print(f"report: {folder / 'report.md'}", flush=True)
    return outcome


def _clear(folder: Path) -> None:
    old = [folder / name for name in MADE if (folder / name).exists()]
    if old:
        print(f"replacing the earlier demo in {folder}: {', '.join(path.name for path in old)}", flush=True)
    for path in old:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def complete(
    settings: Settings, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]
) -> list[Completion]:
    """Completions by the pre-trained and the tuned model, greedy and sampled, with VADER's sentiment.

    Both models draw with the same noise, prompt by prompt. Greedy completions are made only for the prompts
    that the report shows.
    """
    judge = SentimentIntensityAnalyzer()
    shown = prompts[:SHOWN]
    modes = [("greedy", shown, 0.0), ("sampled", prompts, TEMPERATURE)]
    completions = []
    with bar(total=len(STAGES) * (len(shown) + len(prompts)), unit="completion") as progress:
        for stage in STAGES:
            model = load(settings, stage)
            for mode, chosen, temperature in modes:
                options = {
                    "max_new_tokens": settings.new_tokens,
                    "seed": settings.seed,
                    "temperature": temperature,
                }
                for batch, _, drawn in draw(model, tokenizer, chosen, **options):
                    texts = tokenizer.batch_decode(drawn.tokens, skip_special_tokens=True)
                    for prompt, text in zip(batch, texts, strict=True):
                        completions.append(
                            Completion(stage, mode, prompt, text, judge.polarity_scores(text)["compound"])
                        )
                    progress.update(len(batch))
    return completions


if __name__ == "__main__":
    main()
