"""Prompts, reward functions, a reward model and small configurations for PPO's tests."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastalign.stages import reward
from fastalign.stages.ppo import PPOConfig
from tests.stages.tiny import CHAT, WORDS, save_base, save_tokenizer, sentence, write

FUNCTIONS = """
seen = []

def count(prompts, completions):
    seen.append((prompts, completions))
    return [text.count("a") - 0.05 * len(text) for text in completions]

def answered(prompts, completions, answer):
    return [float(text.count(target)) for text, target in zip(completions, answer, strict=True)]

def of_the_prompt(prompts, completions):
    return [float(len(prompt) > 40) for prompt in prompts]

def short(prompts, completions):
    return [0.0]

def infinite(prompts, completions):
    return [float("inf")] * len(completions)
"""
Make = Callable[..., PPOConfig]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A byte-level BPE tokenizer of 300 entries, prompts as text and messages, preference pairs, and reward
    functions."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "functions.py").write_text(FUNCTIONS)
    rows: dict[str, list[Any]] = {
        "prompts": [{"prompt": sentence(n), "answer": WORDS[n % 3]} for n in range(24)],
        "held_out": [{"prompt": sentence(n + 30)} for n in range(7)],
        "chats": [{"prompt": [{"role": "user", "content": sentence(n)}]} for n in range(24)],
        "answered": [
            {"prompt": [{"role": role, "content": "a"} for role in roles]}
            for roles in (["user"], ["user", "assistant"], ["user"])
        ],
        "pairs": [
            {"prompt": sentence(n), "chosen": " good " + sentence(n), "rejected": " bad " + sentence(n + 81)}
            for n in range(8)
        ],
    }
    paths = {name: write(folder / f"{name}.jsonl", records) for name, records in rows.items()}
    tokenizer = save_tokenizer(folder / "tokenizer", ("<eos>", "<pad>", "<s>"), chat_template=CHAT)
    return paths | {"tokenizer": tokenizer, "functions": str(folder / "functions.py")}


@pytest.fixture(scope="module")
def base(files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of an untrained tiny GPT-2 in fp64."""
    return save_base(tmp_path_factory.mktemp("base"), files["tokenizer"], length=96)


@pytest.fixture(scope="module")
def reward_model(files: dict[str, str], base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a reward model that the stage `reward` left."""
    folder = tmp_path_factory.mktemp("reward")
    options: dict[str, Any] = {
        "max_length": 96,
        "batch_size": 8,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "dtype": "float64",
    }
    reward.run(
        reward.RewardConfig(
            model=base, train_data=files["pairs"], output_dir=str(folder), device="cpu", **options
        )
    )
    return str(folder / "model")


@pytest.fixture
def make(files: dict[str, str], base: str, tmp_path: Path) -> Make:
    """A function from fields to a small configuration with an output_dir of its own, in fp64."""
    runs = itertools.count()

    def configure(**changes: Any) -> PPOConfig:
        values: dict[str, Any] = {
            "train_data": files["prompts"],
            "model": base,
            "output_dir": str(tmp_path / f"run{next(runs)}"),
        }
        values |= {
            "reward": files["functions"] + ":count",
            "max_new_tokens": 12,
            "batch_size": 8,
            "learning_rate": 1e-3,
        }
        values |= {"ppo_epochs": 1, "max_steps": 1, "dtype": "float64", "device": "cpu"}
        return PPOConfig(**(values | changes))

    return configure
