"""TRL's trainers on a tiny random Llama, with TRL's function and with fastalign's head."""

from __future__ import annotations

import functools
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import transformers as tf
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers

from fastalign.integrations import trl as integration

from ..core.words import WORDS

TRAINERS = ("SFT", "DPO", "KTO", "GRPO", "RLOO", "Reward")
CLOCK = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "step_time", "total_flos"}


class Run(NamedTuple):
    """What a training logged, how often each side scored tokens, and its seconds."""

    logs: list[dict[str, float]]
    trl_calls: int
    fastalign_calls: int
    seconds: float


class Sizes(NamedTuple):
    """The model's sizes and the length of its texts in words."""

    vocab: int = 64
    hidden: int = 32
    layers: int = 2
    words: int = 6


TINY = Sizes()
NEAR_ZERO = re.compile(r"(eval_)?(rewards/(chosen|rejected|margins)|kl|mean_token_accuracy)$")


def tokenizer(vocab: int) -> tf.PreTrainedTokenizerFast:
    """A tokenizer of words; ids beyond WORDS are words w0, w1, ..."""
    special = ["<pad>", "<eos>", "<unk>"]
    fillers = [f"w{number}" for number in range(vocab - len(special) - len(WORDS))]
    ids = {word: number for number, word in enumerate([*special, *WORDS, *fillers])}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def text(number: int, words: int) -> str:
    """A text of words / 2 to words words."""
    length = words - number * 5 % (words // 2 + 1)
    return " ".join(WORDS[(number * 7 + 3 * place * place) % len(WORDS)] for place in range(length))


def dataset(trainer: str, words: int, rows: int = 24) -> Dataset:
    """Prompts, and what the trainer needs beside them."""

    def row(number: int) -> dict[str, Any]:
        prompt, good, bad = (text(3 * number + part, words) for part in range(3))
        if trainer == "SFT":
            return {"prompt": prompt, "completion": " " + good}
        if trainer in ("DPO", "Reward"):
            return {"prompt": prompt, "chosen": " " + good, "rejected": " " + bad}
        if trainer == "KTO":
            return {"prompt": prompt, "completion": " " + good, "label": number % 2 == 0}
        return {"prompt": prompt}

    return Dataset.from_list([row(number) for number in range(rows)])


def model(trainer: str, sizes: Sizes, config: Mapping[str, Any]) -> tf.PreTrainedModel:
    """A small model for the trainer, with the same random weights at each call."""
    torch.manual_seed(0)
    kind = {
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "intermediate_size": 2 * sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 1,
        "initializer_range": 0.2,
        "dtype": torch.float32,
        **config,
    }
    config_class = tf.Gemma2Config if "final_logit_softcapping" in config else tf.LlamaConfig
    auto = tf.AutoModelForSequenceClassification if trainer == "Reward" else tf.AutoModelForCausalLM
    extra = {"num_labels": 1} if trainer == "Reward" else {}
    return auto.from_config(config_class(**kind, **extra))


def loaded(built: tf.PreTrainedModel, path: str) -> tf.PreTrainedModel:
    """The model read from a folder, from which TRL reads the reference again."""
    built.save_pretrained(path)
    return type(built).from_pretrained(path, dtype=built.dtype)


def letters(completions: list[str], **_: Any) -> list[float]:
    """The reward of a completion: how many letters it has."""
    return [float(len(completion)) for completion in completions]


@contextmanager
def counting_trl() -> Iterator[list[int]]:
    """Count the calls of TRL's own function."""
    import trl.trainer.utils as utils

    kernel, calls = utils._ChunkedLogProbFunction, []
    original = kernel.forward

    @functools.wraps(original)
    def forward(*arguments: Any) -> Any:
        calls.append(1)
        return original(*arguments)

    kernel.forward = staticmethod(forward)
    try:
        yield calls
    finally:
        kernel.forward = staticmethod(original)


def train(
    trainer: str,
    *,
    patched: bool,
    steps: int = 10,
    sizes: Sizes = TINY,
    config: Mapping[str, Any] | None = None,
    lora: Any = None,
    prepare: Callable[[Any], Any] | None = None,
    patch: Mapping[str, Any] | None = None,
    **options: Any,
) -> Run:
    """Train, with fastalign's head if `patched`.

    Args:
        trainer: one of TRAINERS.
        config: more of the model's config; a final_logit_softcapping makes it a Gemma 2.
        lora: a LoraConfig.
        patch: arguments of `patch()`.
        prepare: is given the model before the trainer gets it, such as fuse_head.
        **options: of the trainer's config.
    """
    import trl

    with tempfile.TemporaryDirectory() as folder, counting_trl() as trl_calls, warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        settings = {
            "output_dir": folder,
            "max_steps": steps,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "learning_rate": 1e-4,
            "lr_scheduler_type": "constant",
        }
        if trainer in ("GRPO", "RLOO"):
            settings |= {"num_generations": 4, "max_completion_length": sizes.words, "beta": 0.05}
        rows = dataset(trainer, sizes.words)
        arguments = {"reward_funcs": letters} if trainer in ("GRPO", "RLOO") else {}
        if settings.get("eval_strategy", options.get("eval_strategy", "no")) != "no":
            arguments["eval_dataset"] = rows.select(range(8))
        disable_progress_bars()
        policy = loaded(model(trainer, sizes, config or {}), f"{folder}/model")
        if prepare is not None:
            prepare(policy)
        handle = integration.patch(**(patch or {})) if patched else None
        try:
            trained = getattr(trl, f"{trainer}Trainer")(
                model=policy,
                args=getattr(trl, f"{trainer}Config")(**(settings | options)),
                train_dataset=rows,
                processing_class=tokenizer(sizes.vocab),
                peft_config=lora,
                **arguments,
            )
            trained.remove_callback(tf.PrinterCallback)
            began = time.perf_counter()
            trained.train()
            seconds = time.perf_counter() - began
        finally:
            integration.unpatch()
    logs = [
        {
            name: value
            for name, value in line.items()
            if name not in CLOCK and not name.endswith(("_runtime", "_per_second"))
        }
        for line in trained.state.log_history
    ]
    return Run(logs, len(trl_calls), handle.calls if handle else 0, seconds)


class Difference(NamedTuple):
    """The largest relative difference of a number and its name; the same of values near 0, absolute."""

    relative: float
    name: str
    absolute: float
    absolute_name: str


def largest_difference(a: Run, b: Run) -> Difference:
    """The largest differences of the numbers that two trainings logged.

    Rewards, margins and KL are differences of log-probabilities, and the loss of GRPO and RLOO is a sum of
    advantages times ratios. They are 0 to rounding in the first steps, as is the accuracy of a random model,
    so their absolute difference counts.
    """
    relative, absolute = (0.0, ""), (0.0, "")
    assert len(a.logs) == len(b.logs)
    for ours, theirs in zip(a.logs, b.logs, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            error = abs(value - theirs[name])
            if NEAR_ZERO.match(name) or (name.endswith("loss") and "reward" in a.logs[0]):
                absolute = max(absolute, (error, name))
            elif error:
                relative = max(relative, (error / max(abs(value), abs(theirs[name])), name))
    return Difference(*relative, *absolute)
