"""How a Python function that scores completions is found and called."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastalign.data.tokens import Prompt
from fastalign.stages import ppo
from fastalign.stages.policy.reward_functions import Function, by_function, find_function

ROWS = [Prompt([1], {"prompt": f"prompt {n}", "answer": f"answer {n}", "level": n}) for n in range(2)]
SEEN: list[Any] = []


class Words:
    """A tokenizer of two completions."""

    def batch_decode(self, completions: list[list[int]], *, skip_special_tokens: bool) -> list[str]:
        return [f"completion {ids[0]}" for ids in completions]


def score(function: Callable[..., Any]) -> list[float]:
    """What a function gives for two completions of two rows."""
    words: Any = Words()
    return by_function(Function("my.py:f", function), words)(ROWS, [[0], [1]]).tolist()


def of_trl(completions, answer, **kwargs):
    SEEN.append((completions, answer, kwargs))
    return [0.0, 1.0]


def of_trl_alone(completions):
    SEEN.append(completions)
    return [0.0, 1.0]


def backwards(completions, prompts):
    SEEN.append((prompts, completions))
    return [0.0, 1.0]


def by_place(first, second, *, answer):
    SEEN.append((first, second, answer))
    return [0.0, 1.0]


PROMPTS, COMPLETIONS, ANSWERS = (
    [f"{what} {n}" for n in range(2)] for what in ("prompt", "completion", "answer")
)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (of_trl, (COMPLETIONS, ANSWERS, {"prompts": PROMPTS, "level": [0, 1]})),
        (of_trl_alone, COMPLETIONS),
        (backwards, (PROMPTS, COMPLETIONS)),
        (by_place, (PROMPTS, COMPLETIONS, ANSWERS)),
    ],
)
def test_a_parameter_called_completions_gets_the_completions(
    function: Callable[..., Any], expected: Any
) -> None:
    assert score(function) == [0.0, 1.0] and SEEN[-1] == expected


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda completion, answer: [0.0] * 2,
            r"my\.py:f\(completion, answer\), expected parameters 'prompts'",
        ),
        (lambda text, answer: [0.0] * 2, r"my\.py:f\(text, answer\), expected parameters 'prompts'"),
        (lambda queries, prompts: [0.0] * 2, r"my\.py:f\(queries, prompts\), expected parameters 'prompts'"),
        (lambda texts: [0.0] * 2, r"my\.py:f\(texts\), expected parameters 'prompts' and 'completions'"),
        (
            lambda prompts, completions, solution: [0.0] * 2,
            r"my\.py:f\(prompts, completions, solution\), whose parameter 'solution' is no column, expected "
            r"columns of the rows \(answer, level\) or a default",
        ),
        (
            lambda prompts, completions: dict(prompts=1)["x"],
            r"KeyError: 'x' \(.*test_reward_functions\.py, line \d+\) from my\.py:f",
        ),
    ],
)
def test_a_function_that_cannot_be_called_so_is_refused_in_one_line(
    function: Callable[..., Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^reward: got {message}"):
        score(function)


def test_a_parameter_that_is_no_column_is_refused_before_a_model_loads(
    make: Callable[..., Any], tmp_path: Path, no_model: None
) -> None:
    (tmp_path / "my.py").write_text("def f(completions, solution): return [0.0] * len(completions)\n")
    with pytest.raises(ValueError, match="whose parameter 'solution' is no column"):
        ppo.run(make(reward=f"{tmp_path}/my.py:f"))


FILE = """
from __future__ import annotations
from dataclasses import dataclass
import neighbour_of_rewards

@dataclass
class Options:
    weight: float = neighbour_of_rewards.WEIGHT

def score(prompts, completions):
    return [Options().weight] * len(completions)
"""


def test_a_file_may_have_dataclasses_and_neighbours_and_can_be_pickled(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_rewards.py").write_text("WEIGHT = 2.0\n")
    (tmp_path / "rewards_of_a_stranger.py").write_text(FILE)
    (tmp_path / "json.py").write_text("def score(prompts, completions): return [3.0] * len(completions)\n")
    function = find_function(f"{tmp_path}/rewards_of_a_stranger.py:score")
    assert score(function.call) == [2.0, 2.0]
    assert pickle.loads(pickle.dumps(function.call)) is function.call
    assert score(find_function(f"{tmp_path}/json.py:score").call) == [3.0, 3.0]
    import json

    assert json.dumps({}) == "{}"


@pytest.mark.parametrize(
    ("text", "message"),
    [("def score(:\n", r"SyntaxError: .*line 1"), ("a = b\n", r"NameError: name 'b' .*broken\.py, line 1")],
)
def test_a_file_that_fails_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(ValueError, match=rf"^reward: got '.*broken\.py:score', which raised {message}"):
        find_function(f"{tmp_path}/broken.py:score")
