"""Fixtures of the first two stages' tests; the files of others bring their own `files`, `base` and
configurations."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from fastalign.stages import pretrain, sft
from tests.stages.tiny import LLAMA, save_base, save_tokenizer, sentence, write


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A byte-level BPE tokenizer of 300 entries, text and demonstrations."""
    folder = tmp_path_factory.mktemp("files")
    rows = {
        "text": [{"text": sentence(number)} for number in range(40)],
        "held_out": [{"text": sentence(number)} for number in range(100, 107)],
        "pairs": [{"prompt": sentence(n), "completion": " " + sentence(n + 50)} for n in range(24)],
        "long": [{"prompt": sentence(1), "completion": " film" * 80}],
        "bad": [{"prompt": "x", "completion": " y"}, {"prompt": "x", "completion": ""}],
    }
    paths = {name: write(folder / f"{name}.jsonl", records) for name, records in rows.items()}
    return paths | {"tokenizer": save_tokenizer(folder / "tokenizer")}


@pytest.fixture(scope="module")
def base(files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of an untrained tiny GPT-2 in fp64 without dropout."""
    return save_base(
        tmp_path_factory.mktemp("base"),
        files["tokenizer"],
        length=64,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    )


@pytest.fixture
def pretraining(files: dict[str, str], tmp_path: Path) -> Callable[..., pretrain.PretrainConfig]:
    """A function that makes small pre-training configurations, each with an output_dir of its own."""
    runs = itertools.count()

    def make(**changes: Any) -> pretrain.PretrainConfig:
        values: dict[str, Any] = {
            "train_data": files["text"],
            "eval_data": files["held_out"],
            "tokenizer": files["tokenizer"],
        }
        values |= {"model_config": LLAMA, "output_dir": str(tmp_path / f"run{next(runs)}"), "device": "cpu"}
        values |= {"sequence_length": 40, "batch_size": 4, "learning_rate": 1e-2, "max_steps": 7}
        return pretrain.PretrainConfig(**(values | changes))

    return make


@pytest.fixture
def tuning(files: dict[str, str], base: str, tmp_path: Path) -> Callable[..., sft.SFTConfig]:
    """The same for supervised fine-tuning of `base`, in fp64."""
    runs = itertools.count()

    def make(**changes: Any) -> sft.SFTConfig:
        values: dict[str, Any] = {
            "train_data": files["pairs"],
            "model": base,
            "output_dir": str(tmp_path / f"sft{next(runs)}"),
        }
        values |= {"max_length": 64, "batch_size": 8, "learning_rate": 1e-3, "max_steps": 1}
        values |= {"dtype": "float64", "device": "cpu"}
        return sft.SFTConfig(**(values | changes))

    return make


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test where a model is loaded."""

    def refuse(*arguments: Any, **options: Any) -> None:
        pytest.fail("the model was loaded")

    for auto in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        monkeypatch.setattr(auto, "from_pretrained", refuse)
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", refuse)
