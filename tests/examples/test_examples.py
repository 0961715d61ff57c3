"""The programs of examples/ run and do what they say."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str) -> Any:
    """The return value of an example's main()."""
    found = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module.main()


def test_the_training_loop_starts_near_a_uniform_guess_and_learns() -> None:
    losses = run("training_loop")
    assert losses[0] == pytest.approx(math.log(1000), abs=0.2)
    assert losses[-1] < 0.7 * losses[0]


def test_the_fused_hugging_face_model_has_the_loss_of_the_plain_one() -> None:
    plain, fused = run("hugging_face_model")
    assert fused == pytest.approx(plain, rel=1e-6)


def test_dpo_starts_at_ln_2_and_falls() -> None:
    losses = run("dpo")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < losses[0] - 0.1


def test_ppo_raises_the_score() -> None:
    scores = run("ppo")
    assert scores[-1] > scores[0] + 1


def test_each_example_is_listed_and_short() -> None:
    files = sorted(EXAMPLES.glob("*.py"))
    listed = (EXAMPLES / "README.md").read_text()
    assert len(files) == 4
    for file in files:
        assert f"`{file.name}`" in listed
        assert len(file.read_text().splitlines()) <= 50, file.name
