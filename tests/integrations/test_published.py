"""The hosts that published.py describes: what is installed agrees, and anything else is refused by name."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest

from fastalign.integrations import hosts, published
from fastalign.integrations.published import Published
from tests.integrations.stand_ins import installed, stand_in

ALL = {name: value for name, value in vars(published).items() if isinstance(value, Published)}
PATCHES = [
    ("verl", "patch", published.VERL),
    ("verl", "patch_policy_loss", published.VERL_POLICY_LOSS),
    ("openrlhf", "patch", published.OPENRLHF),
    ("llamafactory", "patch", published.LLAMAFACTORY),
]


@pytest.fixture(params=PATCHES, ids=lambda row: f"{row[0]}.{row[1]}")
def patching(request: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, str, Published]:
    name, function, described = request.param
    if installed(described) is not None:
        stand_in(monkeypatch, described, {})
    return importlib.import_module(f"fastalign.integrations.{name}"), function, described


@pytest.mark.parametrize("described", ALL.values(), ids=ALL)
def test_the_installed_host_has_the_published_parameters(described: Published) -> None:
    if (reason := installed(described)) is not None:
        pytest.skip(reason)
    hosts.check_published(described)


def test_another_version_is_refused(patching: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    integration, function, described = patching
    monkeypatch.setattr(hosts, "version", lambda name: "7.0.0")
    with pytest.raises(
        hosts.UnsupportedHostError, match=rf"^{described.host}: got version 7\.0\.0, expected"
    ):
        getattr(integration, function)()


def test_other_parameters_are_refused_and_nothing_is_patched(
    patching: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    integration, function, described = patching
    module, name, _ = described.functions[0]
    owner: Any = importlib.import_module(module)
    *classes, last = name.split(".")
    for part in classes:
        owner = getattr(owner, part)

    def other(hidden: Any, logits: Any) -> None: ...

    monkeypatch.setattr(owner, last, other)
    with pytest.raises(
        hosts.UnsupportedHostError, match=rf"^{described.host}: got {module}\.{name}\(hidden, logits\), exp"
    ):
        getattr(integration, function)()
    assert getattr(owner, last) is other and hosts.patched(described.host) is None


def test_a_host_that_is_not_installed_is_refused_with_the_command(
    patching: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    integration, function, described = patching

    def absent(name: str) -> str:
        raise hosts.PackageNotFoundError(name)

    monkeypatch.setattr(hosts, "version", absent)
    with pytest.raises(ModuleNotFoundError, match=f"pip install '{described.host}=="):
        getattr(integration, function)()
