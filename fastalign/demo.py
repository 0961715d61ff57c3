"""`fastalign demo`: pre-training and SFT of a small Llama on real text, on a CPU in minutes, and a report of what came of it.

    fastalign demo                                  # writes runs/demo/report.md
    fastalign demo --steps 800 --seed 1 --output-dir runs/longer

From 10,605 movie-review sentences (`demo_data` says where they come from) it trains a byte-level BPE tokenizer and a language model on all
but 1,000, then tunes that on prompt -> continuation of the positively rated ones. The report has the loss curves, samples, the sentiment of
the completions before and after, and this library's head beside plain PyTorch.
"""

import argparse
import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from . import demo_report, rollout
from .data import DataError
from .demo_data import chats_of, cut, fetch, read_sentences, split, texts_of, train_tokenizer, write_rows
from .demo_report import STAGES, Completion, Outcome, Shape
from .stages import pretrain, sft
from .stages.report import PROGRESS_SECONDS

VOCABULARY = 2048
MODEL = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
MODEL |= {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}
# A row holds 3.5 sentences of 36.5 tokens, so that nine hold 32; the longest sentence has 96.
ROW_TOKENS, BATCH_ROWS = 128, 9
RECIPE = {
    "batch_size": BATCH_ROWS,
    "schedule": "linear",
    "final_fraction": 0.1,
    "weight_decay": 0.05,
    "max_grad_norm": 1.0,
    "attention": "sdpa",
    "device": "cpu",
}
GENERATED = 128  # completions in a batch
MARKER = "demo.json"  # tells a folder of the demo, whose contents a new run replaces, from any other
MADE = ("rows", "tokenizer", "pretrain", "sft", "report.md", "pretrain.png", "sft.png", "completions.jsonl")
THREADS_HELP = (
    "threads of torch (default: 1; on a small machine shared with anything else, torch with two threads was measured 3 to 8 times slower)"
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options of the command line, and what tests make smaller."""

    output_dir: Path = Path("runs/demo")
    steps: int = 400
    """Optimizer steps of pre-training; SFT takes 3/8 as many, one pass over the positive sentences by default."""
    data: Path | None = None
    """A copy of the sentences in place of fetching them."""
    seed: int = 0
    threads: int = 1
    held_out: int = 1000
    prompts: int = 512
    """Prompts, of held-out sentences, that are completed before and after SFT."""
    new_tokens: int = 40
    """Longest completion."""
    shapes: tuple[Shape, ...] = demo_report.SHAPES
    """Shapes of the head that are measured."""

    @property
    def sft_steps(self) -> int:
        """Optimizer steps of SFT."""
        return max(1, self.steps * 3 // 8)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; what is wrong with the options or the data ends it with status 2 and a line that says so."""
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="fastalign demo", description="Pre-training and SFT on real text at toy scale, with a report.", allow_abbrev=False
    )
    parser.add_argument("--output-dir", type=Path, default=defaults.output_dir, metavar="DIR", help=f"default: {defaults.output_dir}")
    parser.add_argument(
        "--steps", type=_positive, default=defaults.steps, metavar="N", help=f"steps of pre-training (default: {defaults.steps})"
    )
    parser.add_argument("--data", type=Path, metavar="FILE", help="a copy of the sentences (zip or txt) in place of fetching them")
    parser.add_argument("--seed", type=_natural, default=defaults.seed, metavar="N", help=f"default: {defaults.seed}")
    parser.add_argument("--threads", type=_positive, default=defaults.threads, metavar="N", help=THREADS_HELP)
    settings = Settings(**vars(parser.parse_args(argv)))
    try:
        prepared = prepare(settings)
    except ValueError as error:
        parser.error(str(error))
    disable_progress_bar()  # those of loading and saving, which would break into the demo's own
    run(settings, prepared)


def _natural(text: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
    return int(text)


def _positive(text: str) -> int:
    return _natural(text, least=1)


class Prepared(NamedTuple):
    """What a run starts from: the tokenizer, the rows of each file, prompts to complete; and the seconds that making them took."""

    tokenizer: PreTrainedTokenizerFast
    rows: dict[str, list[dict[str, Any]]]
    prompts: list[str]
    seconds: float


def prepare(settings: Settings) -> Prepared:
    """Claim the output folder, get the sentences and make rows of them; nothing of an earlier demo is removed yet.

    Raises ValueError for a folder that holds anything but an earlier demo, and for sentences that cannot be had, read or used.
    """
    began = time.perf_counter()
    folder = settings.output_dir
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / MARKER).exists())):
        raise ValueError(f"--output-dir: {folder} holds something else than an earlier demo; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text(json.dumps(dataclasses.asdict(settings), default=str, indent=1) + "\n")
    source = settings.data or fetch(folder / "data")
    train, held_out = split(read_sentences(source), settings.held_out)
    tokenizer = train_tokenizer([sentence.text for sentence in train], VOCABULARY)
    rows = {"train": texts_of(train), "held_out": texts_of(held_out)}
    rows |= {"sft_train": chats_of(train, tokenizer), "sft_held_out": chats_of(held_out, tokenizer)}
    cuts = [cut(tokenizer, sentence.text) for sentence in held_out]
    prompts = list(dict.fromkeys(parts[0] for parts in cuts if parts is not None))[: settings.prompts]
    if not rows["sft_train"] or not rows["sft_held_out"] or len(prompts) < 2:
        raise DataError(
            f"{source}: {len(rows['sft_train'])} sentences to tune on, {len(rows['sft_held_out'])} held out and {len(prompts)} prompts; "
            "at least 1, 1 and 2 are needed: positively rated ones and prompts of at least 5 tokens with a continuation"
        )
    return Prepared(tokenizer, rows, prompts, time.perf_counter() - began)


def run(settings: Settings, prepared: Prepared) -> Outcome:
    """Train, tune, sample, measure and write report.md, in the folder that `prepare` claimed; prints the key figures."""
    torch.set_num_threads(settings.threads)
    folder = settings.output_dir
    _clear(folder)
    prepared.tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "rows").mkdir()
    for name, rows in prepared.rows.items():
        write_rows(folder / "rows" / f"{name}.jsonl", rows)
    seconds = {"text and tokenizer": prepared.seconds}
    with _part(STAGES["pretrain"], seconds):
        pretrain.run(pretrain_config(settings))
    with _part(STAGES["sft"], seconds):
        sft.run(sft_config(settings))
    with _part("completions", seconds):
        completions = complete(settings, prepared.tokenizer, prepared.prompts)
        write_rows(folder / "completions.jsonl", [completion._asdict() for completion in completions])
    with _part("this head beside plain PyTorch", seconds):
        heads = [head for shape in _bar(settings.shapes, unit="shape") for head in demo_report.measure_heads(shape)]
    outcome = Outcome(
        folder=folder,
        data=settings.data,
        steps=settings.steps,
        seed=settings.seed,
        threads=settings.threads,
        counts={name: len(own) for name, own in prepared.rows.items()},
        seconds=seconds,
        curves={stage: demo_report.read_curve(folder / stage / "metrics.jsonl") for stage in STAGES},
        completions=completions,
        heads=heads,
    )
    demo_report.write(outcome)
    print("\n".join(demo_report.key_figures(outcome)))
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


def _bar(*arguments: Any, **options: Any) -> tqdm:
    return tqdm(*arguments, mininterval=0.2 if sys.stderr.isatty() else PROGRESS_SECONDS, **options)


@contextmanager
def _part(name: str, seconds: dict[str, float]) -> Iterator[None]:
    print(f"== {name}", flush=True)
    began = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - began


def pretrain_config(settings: Settings) -> pretrain.PretrainConfig:
    """Pre-training from scratch on whole sentences, packed into rows in which they do not see each other."""
    folder = settings.output_dir
    return pretrain.PretrainConfig(
        train_data=str(folder / "rows" / "train.jsonl"),
        eval_data=str(folder / "rows" / "held_out.jsonl"),
        tokenizer=str(folder / "tokenizer"),
        output_dir=str(folder / "pretrain"),
        model_config=MODEL,
        sequence_length=ROW_TOKENS,
        max_steps=settings.steps,
        learning_rate=3e-3,
        **_shared(settings, settings.steps),
    )


def sft_config(settings: Settings) -> sft.SFTConfig:
    """SFT of the pre-trained model on the continuations of positively rated sentences."""
    folder = settings.output_dir
    return sft.SFTConfig(
        train_data=str(folder / "rows" / "sft_train.jsonl"),
        eval_data=str(folder / "rows" / "sft_held_out.jsonl"),
        model=str(folder / "pretrain" / "model"),
        output_dir=str(folder / "sft"),
        max_length=ROW_TOKENS,
        packing=True,
        max_steps=settings.sft_steps,
        learning_rate=3e-3,
        **_shared(settings, settings.sft_steps),
    )


def _shared(settings: Settings, steps: int) -> dict[str, Any]:
    return RECIPE | {"warmup_steps": min(20, steps), "eval_every": max(1, steps // 8), "seed": settings.seed}


def complete(settings: Settings, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> list[Completion]:
    """Completions of the prompts by the pre-trained and the tuned model, greedy and sampled, with VADER's sentiment.

    Both models draw with the same noise, prompt by prompt. Greedy ones are made of the prompts that the report shows only.
    """
    judge = SentimentIntensityAnalyzer()
    shown = prompts[: demo_report.SHOWN]
    ways = [("greedy", shown, 0.0), ("sampled", prompts, demo_report.TEMPERATURE)]
    completions = []
    with _bar(total=len(STAGES) * (len(shown) + len(prompts)), unit="completion") as bar:
        for stage in STAGES:
            model = AutoModelForCausalLM.from_pretrained(settings.output_dir / stage / "model").eval()
            for way, own, temperature in ways:
                for first in range(0, len(own), GENERATED):
                    batch = own[first : first + GENERATED]
                    inputs = tokenizer(list(batch), return_tensors="pt", padding=True, return_token_type_ids=False)
                    drawn = rollout.generate(
                        model,
                        inputs["input_ids"],
                        inputs["attention_mask"],
                        max_new_tokens=settings.new_tokens,
                        seed=settings.seed,
                        sequence_ids=torch.arange(first, first + len(batch)),
                        eos_id=tokenizer.eos_token_id,
                        pad_id=tokenizer.pad_token_id,
                        temperature=temperature,
                    )
                    texts = tokenizer.batch_decode(drawn.tokens, skip_special_tokens=True)
                    for prompt, text in zip(batch, texts, strict=True):
                        completions.append(Completion(stage, way, prompt, text, judge.polarity_scores(text)["compound"]))
                    bar.update(len(batch))
    return completions


if __name__ == "__main__":
    main()
