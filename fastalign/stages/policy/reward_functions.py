"""Scores of completions by a Python function of the user's."""

import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...data.rows import Row
from ...data.tokens import Prompt

# Prompts, completions in tokens -> scores [B] fp64, on the CPU
Reward = Callable[[Sequence[Prompt], Sequence[list[int]]], Tensor]
_PROMPTS, _COMPLETIONS = "prompts", "completions"


class Function(NamedTuple):
    """A Python function, and its name in the configuration."""

    name: str
    call: Callable[..., Any]


class Arguments(NamedTuple):
    """How a function is called."""

    names: tuple[str, ...]
    """Which of prompts and completions it gets by keyword. None of them: it gets both by position."""
    columns: tuple[str, ...]
    """The columns that it gets by keyword."""


def find_function(reward: str) -> Function:
    """The function of "module:function" (a module of the working directory too) or "file.py:function".

    A file may import its neighbours.

    Raises ValueError if there is none.
    """
    source, _, name = reward.rpartition(":")
    try:
        module = _load_file(Path(source)) if source.endswith(".py") else _load_module(source)
    except (ImportError, FileNotFoundError) as error:
        raise ValueError(
            f"reward: got {reward!r} ({error}), expected a function that can be imported"
        ) from error
    except Exception as error:
        raise ValueError(
            f"reward: got {reward!r}, which raised {_described(error)}, expected a function that can be "
            "imported"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        functions = [known for known, value in vars(module).items() if inspect.isfunction(value)]
        raise ValueError(
            f"reward: got {name!r}, expected a function of {source}: {', '.join(functions) or 'it has none'}"
        )
    return Function(reward, function)


def _load_module(name: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # the command `fastalign` starts without it
    return importlib.import_module(name)


def _load_file(path: Path) -> ModuleType:
    """The module of a file, in sys.modules: pickle and dataclasses look it up there."""
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # last, so that no file there hides an installed package
    found = PathFinder.find_spec(path.stem)
    free = path.stem not in sys.modules and found is not None and found.origin == str(path.resolve())
    spec = importlib.util.spec_from_file_location(path.stem if free else f"reward_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


def arguments_of(function: Function, row: Row) -> Arguments:
    """How the function takes prompts, completions and the columns of rows such as `row`.

    If it has a parameter `completions`, as TRL's reward functions have, it is called by keywords alone. If
    not, the first parameter gets the prompts and the second one the completions. Further parameters get the
    columns of their names, and **kwargs gets all other columns.

    Raises ValueError for a function whose first parameters seem to be others, and for a parameter without
    default that is no column.
    """
    try:
        signature = inspect.signature(function.call)
    except (TypeError, ValueError):  # some builtins have none
        return Arguments((), ())
    parameters = signature.parameters.values()
    any_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    named = {
        parameter.name: parameter
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    names: tuple[str, ...] = ()
    if _COMPLETIONS in named:
        names = tuple(name for name in (_PROMPTS, _COMPLETIONS) if any_name or name in named)
        taken = set(names)
    else:
        by_position = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        too_few = len(by_position) < 2 and not any(p.kind is p.VAR_POSITIONAL for p in parameters)
        columns_in_front = {*row} & {*by_position[:2]} - {"prompt", "completion"}
        if too_few or columns_in_front or _PROMPTS in by_position[1:] or "completion" in by_position[:1]:
            raise ValueError(
                f"reward: got {function.name}{signature}, expected parameters 'prompts' and 'completions': "
                "under other names the first one gets the prompts and the second one the completions"
            )
        taken = {*by_position[:2]}
    columns = [name for name in row if name in named and name not in taken]
    for name, parameter in named.items():
        if name not in taken and name not in columns and parameter.default is parameter.empty:
            there = ", ".join(column for column in row if column != "prompt") or "none beside 'prompt'"
            raise ValueError(
                f"reward: got {function.name}{signature}, whose parameter {name!r} is no column, expected "
                f"columns of the rows ({there}) or a default"
            )
    if any_name:
        columns += [name for name in row if name not in (*taken, *columns, "prompt")]
    return Arguments(names, tuple(columns))


def by_function(function: Function, tokenizer: PreTrainedTokenizerBase) -> Reward:
    """Scores by the function.

    It gets the rows' prompts, as text or messages, the completions as text, and columns: `arguments_of`.
    """

    def score(prompts: Sequence[Prompt], completions: Sequence[list[int]]) -> Tensor:
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        names, columns = arguments_of(function, prompts[0].row)
        keywords = {name: [prompt.row[name] for prompt in prompts] for name in columns}
        given = {_PROMPTS: [prompt.row["prompt"] for prompt in prompts], _COMPLETIONS: texts}
        try:
            if names:
                returned = function.call(**{name: given[name] for name in names}, **keywords)
            else:
                returned = function.call(*given.values(), **keywords)
        except Exception as error:
            raise ValueError(
                f"reward: got {_described(error)} from {function.name}, expected a list of {len(texts)} "
                "numbers"
            ) from error
        scores = _numbers(function.name, returned, texts)
        wrong = [place for place, value in enumerate(scores) if not math.isfinite(value)]
        if wrong:
            raise ValueError(
                f"reward: got {scores[wrong[0]]} from {function.name} for {texts[wrong[0]]!r}, expected a "
                "finite number"
            )
        return torch.tensor(scores, dtype=torch.float64)

    return score


def _described(error: BaseException) -> str:
    """An exception of the user's code, with its last place in a file."""
    message = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError):  # it names file and line itself
        return message
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{message} ({last.filename}, line {last.lineno})"


def _numbers(name: str, returned: Any, texts: Sequence[str]) -> list[float]:
    """What a reward function returned, as numbers. Raises ValueError that names what is no number."""
    expected = f"expected a list of {len(texts)} numbers"
    # The items of a mapping are its keys, and a set has no order.
    if isinstance(returned, str | bytes | Mapping | AbstractSet):
        raise ValueError(f"reward: got {_short(returned)} from {name}, {expected}")
    try:
        values = list(returned)
    except TypeError as error:
        raise ValueError(f"reward: got {_short(returned)} from {name}, {expected}") from error
    if len(values) != len(texts):
        raise ValueError(
            f"reward: got {len(values)} scores from {name}, expected {len(texts)}, one a completion"
        )
    numbers = []
    for place, (value, text) in enumerate(zip(values, texts, strict=True), 1):
        try:
            if isinstance(value, str | bytes | complex):  # float would read some
                raise TypeError("got no number, expected one")
            numbers.append(float(value))
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            where = f"completion {place} of {len(texts)}, {text[:60]!r}"
            raise ValueError(
                f"reward: got {_short(value)} from {name} for {where}, expected a finite number"
            ) from error
    return numbers


def _short(value: Any) -> str:
    shown = repr(value)
    return f"{shown if len(shown) <= 60 else shown[:57] + '...'} ({type(value).__name__})"
