"""A stage that is run twice with the same number of threads gives the same metrics and weights, bit by bit
(docs/determinism.md)."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastalign.stages import dpo, grpo, kto, ppo, pretrain, reward, sft
from fastalign.stages.models import loading
from tests.stages.tiny import LLAMA, lines, save_tokenizer, sentence, weights, write

STAGES: dict[str, tuple[ModuleType, Any, dict[str, Any]]] = {
    "pretrain": (
        pretrain,
        pretrain.PretrainConfig,
        {"train_data": "text", "model_config": LLAMA, "sequence_length": 40},
    ),
    "sft": (sft, sft.SFTConfig, {"train_data": "demonstrations", "max_length": 64}),
    "reward": (reward, reward.RewardConfig, {"train_data": "pairs", "max_length": 64}),
    "dpo": (dpo, dpo.DPOConfig, {"train_data": "pairs", "max_length": 64}),
    "kto": (kto, kto.KTOConfig, {"train_data": "judged", "max_length": 64}),
    "ppo": (
        ppo,
        ppo.PPOConfig,
        {"train_data": "prompts", "reward": "functions.py:count", "max_new_tokens": 12},
    ),
    "grpo": (
        grpo,
        grpo.GRPOConfig,
        {
            "train_data": "prompts",
            "reward": "functions.py:count",
            "max_new_tokens": 12,
            "group_size": 4,
        },
    ),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Data of every stage, a tokenizer, a reward function, and an untrained tiny Llama."""
    folder = tmp_path_factory.mktemp("files")
    rows: dict[str, list[dict[str, Any]]] = {
        "text": [{"text": sentence(n)} for n in range(40)],
        "demonstrations": [{"prompt": sentence(n), "completion": " " + sentence(n + 50)} for n in range(24)],
        "pairs": [
            {"prompt": sentence(n), "chosen": " good " + sentence(n), "rejected": " bad " + sentence(n + 81)}
            for n in range(24)
        ],
        "judged": [
            {"prompt": sentence(n), "completion": " " + sentence(n + 50), "label": n % 3 > 0}
            for n in range(24)
        ],
        "prompts": [{"prompt": sentence(n)} for n in range(24)],
    }
    paths = {name: write(folder / f"{name}.jsonl", records) for name, records in rows.items()}
    (folder / "functions.py").write_text(
        "def count(prompts, completions):\n    return [float(text.count('a')) for text in completions]\n"
    )
    tokenizer = save_tokenizer(folder / "tokenizer")
    torch.manual_seed(3)
    architecture = loading.scratch_config(LLAMA, loading.load_tokenizer(tokenizer), length=96)
    AutoModelForCausalLM.from_config(architecture).save_pretrained(folder / "base")
    loading.load_tokenizer(tokenizer).save_pretrained(folder / "base")
    return paths | {
        "tokenizer": tokenizer,
        "base": str(folder / "base"),
        "functions.py:count": f"{folder / 'functions.py'}:count",
    }


@pytest.mark.parametrize("stage", STAGES)
def test_two_runs_with_two_threads_are_the_same_run(
    stage: str, files: dict[str, str], tmp_path: Path
) -> None:
    module, make, values = STAGES[stage]
    values = {
        name: files.get(value, value) if isinstance(value, str) else value for name, value in values.items()
    }
    values |= {"tokenizer": files["tokenizer"]} if stage == "pretrain" else {"model": files["base"]}
    values |= {
        "batch_size": 8,
        "max_steps": 1 if stage in ("ppo", "grpo") else 2,
        "learning_rate": 1e-3,
        "dtype": "float32",
        "device": "cpu",
    }
    before = torch.get_num_threads()
    configs = []
    try:
        torch.set_num_threads(2)
        for run in ("one", "other"):
            torch.randn(3)  # what the process did before must not matter
            configs.append(make(output_dir=str(tmp_path / run), **values))
            module.run(configs[-1])
    finally:
        torch.set_num_threads(before)
    one, other = configs
    assert lines(one) == lines(other) and lines(one)
    expected, found = weights(one), weights(other)
    assert expected.keys() == found.keys() and all(
        torch.equal(expected[name], found[name]) for name in expected
    )
