"""Pairs, judged completions, a tiny model and small configurations for the stages of preferences."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.stages.preference.runs import STAGES, Make
from tests.stages.tiny import (
    save_base,
    save_tokenizer,
    sentence,
    write,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A byte-level BPE tokenizer of 300 entries, pairs and judged completions."""
    folder = tmp_path_factory.mktemp("files")
    pairs = [
        {"prompt": sentence(n), "chosen": " good " + sentence(n + 50), "rejected": " bad " + sentence(n + 81)}
        for n in range(24)
    ]
    rows: dict[str, list[Any]] = {
        "pairs": pairs,
        "held_out_pairs": [row | {"prompt": row["prompt"] + " story"} for row in pairs[:7]],
        "margins": [row | {"margin": n / 8} for n, row in enumerate(pairs)],
        "judged": [
            {
                "prompt": row["prompt"],
                "completion": row["chosen"] if n % 3 else row["rejected"],
                "label": n % 3 > 0,
            }
            for n, row in enumerate(pairs)
        ],
        "held_out_judged": [
            {
                "prompt": row["prompt"] + " actor",
                "completion": row["chosen"] if n % 3 else row["rejected"],
                "label": n % 3 > 0,
            }
            for n, row in enumerate(pairs[:7])
        ],
        "two": [
            {"prompt": sentence(n), "completion": f" {word} {sentence(n + 50)}", "label": n > 0}
            for n, word in enumerate(("bad", "good"))
        ],
        "alike": [{"prompt": sentence(n), "completion": " good", "label": True} for n in range(4)],
        "bad": [pairs[0], pairs[1] | {"rejected": pairs[1]["chosen"]}],
        "bad_labels": [{"prompt": "a", "completion": " b", "label": label} for label in (True, "yes")],
    }
    paths = {name: write(folder / f"{name}.jsonl", records) for name, records in rows.items()}
    return paths | {"tokenizer": save_tokenizer(folder / "tokenizer")}


@pytest.fixture(scope="module")
def base(files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of an untrained tiny GPT-2 in fp64."""
    return save_base(tmp_path_factory.mktemp("base"), files["tokenizer"], length=64)


@pytest.fixture
def make(files: dict[str, str], base: str, tmp_path: Path) -> Make:
    """A function from a stage's name and fields to a small configuration with an output_dir of its own, in
    fp64."""
    runs = itertools.count()

    def configure(stage: str, **changes: Any) -> Any:
        _, config, data = STAGES[stage]
        values: dict[str, Any] = {
            "train_data": files[data],
            "model": base,
            "output_dir": str(tmp_path / f"run{next(runs)}"),
        }
        values |= {
            "max_length": 64,
            "batch_size": 8,
            "learning_rate": 1e-3,
            "max_steps": 1,
            "dtype": "float64",
            "device": "cpu",
        }
        return config(**(values | changes))

    return configure
