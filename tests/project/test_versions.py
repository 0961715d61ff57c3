"""What is said when a package is newer than the tests have seen, and that the table of what they saw is the
lock file's."""

import importlib.metadata
import re
from pathlib import Path

import pytest
import torch
import transformers as tf

from fastalign import cli, versions
from fastalign.causal_lm import UnsupportedModelError, fuse_head

ROOT = Path(__file__).parents[2]
NOTE = "transformers 99.0.0.dev1 is newer than 5.1.2, the newest that fastalign was tested with"


@pytest.fixture
def newer_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        versions, "TESTED", {"transformers": "5.1.2", "torch": torch.__version__, "not-there": "1"}
    )
    installed = {"transformers": "99.0.0.dev1"}
    monkeypatch.setattr(
        versions, "version", lambda package: installed.get(package) or importlib.metadata.version(package)
    )


def test_the_tested_versions_are_those_of_the_lock_file() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    locked = dict(line.split("==") for line in lines if "==" in line)
    locked = {name.lower().replace("_", "-"): number for name, number in locked.items()}
    assert {package: locked[package] for package in versions.TESTED} == versions.TESTED


@pytest.mark.parametrize(
    ("installed", "newer"),
    [
        ("2.13.0", False),
        ("2.13.0+cpu", False),
        ("2.9.1", False),
        ("2.13", False),
        ("2.13.1", True),
        ("2.14.0.dev2026", True),
        ("10.0", True),
    ],
)
def test_versions_are_compared_by_their_numbers(
    installed: str, newer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "TESTED", {"torch": "2.13.0"})
    monkeypatch.setattr(versions, "version", lambda package: installed)
    line = f"torch {installed} is newer than 2.13.0, the newest that fastalign was tested with"
    assert versions.newer_than_tested() == [line] * newer


@pytest.mark.usefixtures("newer_transformers")
def test_a_model_that_is_refused_under_a_newer_package_says_so_once() -> None:
    encoder = tf.BertModel(
        tf.BertConfig(
            vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
        )
    )
    with pytest.raises(UnsupportedModelError, match=re.escape(NOTE)) as refusal:
        fuse_head(encoder)
    assert not hasattr(refusal.value, "__notes__")


@pytest.mark.usefixtures("newer_transformers")
def test_an_error_of_the_host_under_a_newer_package_gets_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=16))
    monkeypatch.setattr(model.transformer, "forward", lambda *_, **kwargs: kwargs["moved"])
    with pytest.raises(KeyError) as failure:
        fuse_head(model)
    assert failure.value.__notes__ == [NOTE]


@pytest.mark.usefixtures("newer_transformers")
def test_a_command_that_fails_under_a_newer_package_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.COMMANDS, "sft", ("tests.project.test_versions", ""))
    with pytest.raises(AttributeError) as failure:  # this module has no main
        cli.main(["sft"])
    assert failure.value.__notes__ == [NOTE]
    assert NOTE in cli.environment()
