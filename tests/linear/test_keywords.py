"""The head's keywords are written once: signatures, help and refusals of all functions follow."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastalign_kernels
from fastalign import nn
from fastalign_kernels.linear.options import HEAD_DEFAULTS, HeadArguments, HeadSettings
from tests.kernels.public_calls import FUNCTIONS, REPORTS, call_of

FOLDER = Path(fastalign_kernels.__file__).parent
PAGE = Path(__file__).parents[2] / "docs" / "head.md"
LOSSES = [name for name in FUNCTIONS if name.startswith("linear_")]
MODULES = [nn.LinearCrossEntropyLoss, nn.LinearDPOLoss, nn.LinearKTOLoss, nn.LinearPPOLoss]


def keywords(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(function).parameters
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize("name", LOSSES)
def test_a_signature_is_flat_and_help_documents_each_head_keyword(name: str) -> None:
    shown, documentation = keywords(FUNCTIONS[name]), inspect.getdoc(FUNCTIONS[name]) or ""
    for keyword in HeadArguments.__annotations__:
        assert shown[keyword].default == HEAD_DEFAULTS[keyword]
        assert any(
            keyword in line.split(":")[0].strip().split(", ") for line in documentation.splitlines()
        ), keyword
    assert "**" not in documentation.replace("2**", "")


@pytest.mark.parametrize("module", MODULES)
def test_a_module_shows_the_options_of_its_head(module: Callable[..., Any]) -> None:
    assert HeadSettings.__annotations__.keys() <= keywords(module).keys()
    assert "check" not in keywords(module)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("keyword", ["soft_cap", "lean"])
def test_an_unknown_keyword_is_named_with_its_function(name: str, keyword: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected keyword argument '{keyword}'"):
        FUNCTIONS[name](**call_of(name), **{keyword: 1.0})


@pytest.mark.parametrize("module", MODULES)
def test_an_unknown_option_is_named_with_its_module(module: Callable[..., Any]) -> None:
    for keyword in ("soft_cap", "check", "reference_logps"):
        with pytest.raises(TypeError, match=f"{module.__name__}.* got an unexpected keyword .*'{keyword}'"):
            module(**{keyword: 1.0})


def test_an_unknown_keyword_of_a_modules_call_is_named() -> None:
    with pytest.raises(TypeError, match=r"LinearDPOLoss.forward\(\) got an unexpected keyword .*'check'"):
        nn.LinearDPOLoss()(torch.zeros(2, 1, 3), torch.zeros(5, 3), torch.zeros(2, 1).long(), check=True)


@pytest.mark.parametrize("name", sorted(REPORTS & FUNCTIONS.keys()))
def test_a_report_takes_what_it_names(name: str) -> None:
    for keyword in ("check", "screen"):
        with pytest.raises(TypeError, match=rf"{name}\(\) got an unexpected keyword argument '{keyword}'"):
            FUNCTIONS[name](**call_of(name), **{keyword: True})


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_one_file_of_at_most_120_lines(name: str) -> None:
    path = Path(inspect.getfile(FUNCTIONS[name]))
    assert path.parent == FOLDER / "linear"
    assert len(path.read_text().splitlines()) <= 120


def refuses(name: str, keyword: str) -> bool:
    """Whether the function refuses an option of its head altogether."""
    try:
        FUNCTIONS[name](**call_of(name), **{keyword: {"tail_eps": 2**-12, "screen": True}[keyword]})
    except ValueError as refusal:
        return f"expected None: {name} has" in str(refusal)
    return False


def options_of_the_page() -> dict[str, set[str]]:
    """By argument, the functions that the table "Options" of docs/head.md says take it."""
    table = PAGE.read_text(encoding="utf-8").split("## Options")[1].split("\n## ")[0]
    options: dict[str, set[str]] = {}
    for arguments, functions in re.findall(r"^\| (`.*) \| (.*) \|$", table, re.MULTILINE):
        named = set(re.findall(r"`(linear_\w+)`", functions)) & set(LOSSES)
        all_but = functions.startswith("all that start with `linear_`")
        options |= dict.fromkeys(re.findall(r"`(\w+)`", arguments), set(LOSSES) - named if all_but else named)
    return options


def test_the_page_of_the_head_says_which_function_takes_which_option() -> None:
    page, shown = options_of_the_page(), {name: keywords(FUNCTIONS[name]) | {"bias": None} for name in LOSSES}
    assert page.keys() >= HeadArguments.__annotations__.keys()
    for argument, functions in page.items():
        takes = {name for name in LOSSES if argument in shown[name]}
        if argument in ("tail_eps", "screen"):
            takes -= {name for name in LOSSES if refuses(name, argument)}
        assert functions == takes, argument
