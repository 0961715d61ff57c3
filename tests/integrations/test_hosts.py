"""The frame of the integrations: the check of a host, the count of calls, and the way back."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from fastalign.integrations import hosts
from fastalign.integrations.hosts import PatchedHost, UnsupportedHostError
from fastalign.integrations.published import Function, Published


def score(hidden: Any, weight: Any) -> int:
    return 1


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.setattr(hosts, "version", lambda name: "1.16.2")
    return SimpleNamespace(__name__="host.utils", score=score)


@pytest.fixture
def handle(host: SimpleNamespace) -> Iterator[PatchedHost]:
    handle = PatchedHost("host")
    handle.replace(host, "score", lambda hidden, weight: handle.count())
    yield handle
    handle.unpatch()


def test_importing_the_package_imports_no_host() -> None:
    code = (
        "import sys; from fastalign.integrations import llamafactory, openrlhf, transformers, "
        "trl, verl; "
        "print([name for name in ('trl', 'transformers', 'verl', 'peft') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize("tested", [("1.16",), ("1.15", "1.16"), ("1",)])
def test_a_tested_version_is_accepted(host: Any, tested: tuple[str, ...]) -> None:
    assert hosts.check_version("host", tested) == "1.16.2"


@pytest.mark.parametrize("tested", [("1.1",), ("1.17",), ("1.16.20",)])
def test_another_version_is_refused_by_name(host: Any, tested: tuple[str, ...]) -> None:
    with pytest.raises(
        UnsupportedHostError, match=rf"^host: got version 1\.16\.2, expected {tested[0]}, "
    ) as refusal:
        hosts.check_version("host", tested)
    assert "\n" not in str(refusal.value)


def test_a_host_that_is_not_installed_is_refused_with_the_command() -> None:
    with pytest.raises(ModuleNotFoundError, match="pip install 'no-such-host==1.16.*'"):
        hosts.check_version("no-such-host", ("1.16",))


def test_a_function_with_the_expected_parameters_is_returned(host: Any) -> None:
    assert hosts.check_parameters("host", "score", host, ("hidden", "weight")) is score


def test_other_parameters_are_refused_by_name(host: Any) -> None:
    with pytest.raises(
        UnsupportedHostError,
        match=r"^host: got host.utils.score\(hidden, weight\), expected \(hidden, bias\)",
    ):
        hosts.check_parameters("host", "score", host, ("hidden", "bias"))


def test_an_absent_function_is_refused_by_name(host: Any) -> None:
    with pytest.raises(
        UnsupportedHostError, match=r"^host: got host.utils without draw, expected draw\(logits\)"
    ):
        hosts.check_parameters("host", "draw", host, ("logits",))


def test_calls_are_counted_until_unpatched(host: Any, handle: PatchedHost) -> None:
    host.score(0, 0)
    host.score(0, 0)
    assert handle.calls == 2 and handle.active
    hosts.unpatch("host")
    assert host.score(0, 0) == 1 and handle.calls == 2 and not handle.active
    hosts.unpatch("host")


def test_a_with_block_undoes_the_patch(host: Any) -> None:
    handle = PatchedHost("host")
    handle.replace(host, "score", None)
    with handle:
        assert host.score is None
    assert host.score is score


def test_each_module_that_imported_a_function_by_name_gets_the_patch(
    host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules: dict[str, Any] = {name: ModuleType(name) for name in ("host.utils", "host.early", "host.late")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    owner, early, late = modules.values()
    owner.score = early.renamed = score
    handle = PatchedHost("host")
    handle.replace_function(owner, "score", lambda hidden, weight: 2)
    late.score = owner.score  # imported while the host is patched
    assert owner.score(0, 0) == early.renamed(0, 0) == late.score(0, 0) == 2
    handle.unpatch()
    assert owner.score is early.renamed is late.score is score


def test_a_host_without_the_module_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "version", lambda name: "1.16.2")
    function = Function("json.new_module.deeper", "score", ())
    with pytest.raises(UnsupportedHostError, match=r"^json: got version 1\.16\.2 without the module"):
        hosts.check_published(Published("json", ("1.16",), "", (function,)))


def test_a_package_that_the_host_needs_is_not_called_another_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "version", lambda name: "1.16.2")
    monkeypatch.setattr(hosts.importlib, "import_module", lambda name: __import__("no_such_package"))
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        hosts.check_published(Published("json", ("1.16",), "", (Function("json.tool", "main", ()),)))


def test_the_second_patch_is_the_first_unless_its_options_differ(handle: PatchedHost) -> None:
    assert PatchedHost.current("host") is handle and PatchedHost.current("another") is None
    with pytest.raises(ValueError, match="unpatch\\(\\) first"):
        PatchedHost.current("host", {"tail_eps": 0.5})


@pytest.mark.parametrize("options", [{"tail_eps": 2}, {"workspace_mib": 0}, {"workspace_mib": "64"}])
def test_an_option_out_of_range_is_refused_before_the_host_is_patched(options: dict[str, Any]) -> None:
    """The first call of a training would refuse it otherwise."""
    with pytest.raises(ValueError, match=rf"^{next(iter(options))}: got .*, expected a "):
        PatchedHost.current("a host", options)


def test_a_patch_over_ours_is_not_undone_silently(host: Any, handle: PatchedHost) -> None:
    ours, host.score = host.score, score
    with pytest.raises(ValueError, match=r"unpatch: got another host.utils.score, expected fastalign's"):
        handle.unpatch()
    assert handle.active
    host.score = ours


def test_an_entry_that_someone_else_replaced_is_not_undone_silently() -> None:
    table = {"vanilla": "the host's"}
    handle = PatchedHost("host")
    handle.replace_item(table, "vanilla", "ours")
    table["vanilla"] = "someone else's"
    with pytest.raises(ValueError, match="unpatch: got another entry vanilla, expected fastalign's"):
        handle.unpatch()
    assert table == {"vanilla": "someone else's"}
    table["vanilla"] = "ours"
    handle.unpatch()
    assert table == {"vanilla": "the host's"}


def test_a_warning_is_given_once(handle: PatchedHost) -> None:
    with pytest.warns(UserWarning, match="falls back") as warned:
        handle.warn_once("falls back")
        handle.warn_once("falls back")
    assert len(warned) == 1


def test_a_compiled_call_is_counted_when_it_is_traced(handle: PatchedHost) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        handle.count()
        return x + 1

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    for _ in range(3):
        compiled(torch.zeros(2))
    assert handle.calls == 1
