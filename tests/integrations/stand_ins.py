"""Modules that stand in for a host that is not installed, with the functions that published.py lists."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from fastalign.integrations import hosts
from fastalign.integrations.published import Function, Published

KEYWORDS = ("kwargs", "mm_inputs")  # the parameters that collect further keywords


def installed(published: Published) -> str | None:
    """Why the host cannot be used here; None if all modules of the functions can be imported."""
    try:
        hosts.check_version(published.host, published.tested)
        for function in published.functions:
            importlib.import_module(function.module)
    except (ImportError, hosts.UnsupportedHostError) as reason:
        return str(reason)
    return None


def stand_in(
    monkeypatch: pytest.MonkeyPatch, published: Published, bodies: dict[str, Callable[..., Any]]
) -> None:
    """Put modules of the host in sys.modules. A function without a body in `bodies` returns None."""
    monkeypatch.setattr(hosts, "version", lambda name: f"{published.tested[0]}.1")
    for function in published.functions:
        owner: Any = module(monkeypatch, function.module)
        *classes, name = function.name.split(".")
        for part in classes:
            if not hasattr(owner, part):
                setattr(owner, part, type(part, (), {"__module__": function.module}))
            owner = getattr(owner, part)
        setattr(owner, name, with_parameters(function, bodies.get(function.name, lambda *_, **__: None)))


def module(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    """The module of this name in sys.modules, made with its parents if it is not there."""
    parts = name.split(".")
    for length in range(1, len(parts) + 1):
        path = ".".join(parts[:length])
        if path not in sys.modules:
            made = ModuleType(path)
            made.__path__ = []
            monkeypatch.setitem(sys.modules, path, made)
            if length > 1:
                setattr(sys.modules[".".join(parts[: length - 1])], parts[length - 1], made)
    return sys.modules[name]


def with_parameters(function: Function, body: Callable[..., Any]) -> Callable[..., Any]:
    """A function with the published parameters, which calls `body` with the arguments that were given."""
    name = function.name.rpartition(".")[2]
    parameters = ", ".join(f"**{p}" if p in KEYWORDS else f"{p}=absent" for p in function.parameters)
    given = ", ".join(f"{p!r}: {p}" for p in function.parameters if p not in KEYWORDS)
    scope: dict[str, Any] = {"absent": object(), "body": body}
    exec(
        f"def {name}({parameters}):\n"
        f"    return body(**{{name: value for name, value in {{{given}}}.items() if value is not absent}})",
        scope,
    )
    return scope[name]
