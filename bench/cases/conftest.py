"""Shows the suite through pytest-benchmark: one test for each method of each case.

pytest-benchmark times one method to its end and then the next, so a machine that is slow for a while changes
the ratios. Here the first test of a case measures all its methods in turns, and the test of each method hands
that method's rounds to pytest-benchmark.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.cases.case import Case, Measured
from bench.cases.measure import as_json, left_out, measure
from bench.core.operation import EAGER, Shape, is_ours
from bench.core.peers import found
from fastalign.measure import machine

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_begun = time.monotonic()
_measured: dict[str, Measured | None] = {}  # by case; None while the case is being measured


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastalign")
    group.addoption(
        "--shape",
        help="N,H,V, in place of the shape of each case",
        type=lambda text: Shape(*map(int, text.split(","))),
    )
    group.addoption(
        "--seconds",
        help="time for the interleaved rounds of a case (3 to 20 rounds)",
        type=float,
        default=10.0,
    )
    group.addoption(
        "--minutes",
        help="no case starts after so many minutes; cases that did not start are named in the results",
        type=float,
        default=float("inf"),
    )


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """record(case, row) measures a case of the test's module once and reports the row's rounds.

    A row without figures is skipped. It fails instead if it is ours, or plain PyTorch's, which judges ours,
    and its inputs are available.
    """

    def recorded(name: str, row_name: str) -> None:
        result = _result(name, request.module.CASES[name], request.config)
        row = result.rows[row_name]
        if row.timing is None:
            vital = (is_ours(row_name) or row_name == EAGER) and not row.refused.startswith(
                ("absent", "left out")
            )
            (pytest.fail if vital else pytest.skip)(row.refused)
        replay = itertools.chain.from_iterable((0.0, seconds) for seconds in row.timing.seconds)
        request.node.add_marker(pytest.mark.benchmark(group=name, timer=lambda: next(replay)))
        benchmark = request.getfixturevalue("benchmark")
        ceiling = result.rows[next(iter(result.case.ceilings))].timing
        benchmark.extra_info.update(peak_mib=row.peak_mib, times_ceiling=ceiling and row.timing.over(ceiling))
        benchmark.pedantic(lambda: None, rounds=len(row.timing.seconds))

    return recorded


def _result(name: str, case: Case, config: pytest.Config) -> Measured:
    if name not in _measured:
        _measured[name] = None
        shape, minutes = config.getoption("--shape"), config.getoption("--minutes")
        case = case._replace(shape=shape) if shape else case
        begin = time.monotonic()
        if begin - _begun > 60 * minutes:
            _measured[name] = left_out(name, case, f"left out: the {minutes:g} minutes of this run were over")
        else:
            _measured[name] = measure(name, case, DEVICE, config.getoption("--seconds"))
        terminal: Any = config.pluginmanager.get_plugin("terminalreporter")
        terminal.write_line(f" {name}: measured in {time.monotonic() - begin:.0f} s")
    result = _measured[name]
    if result is None:
        pytest.fail(f"{name} could not be measured: see the failure of its first test")
    return result


def pytest_benchmark_generate_machine_info() -> dict[str, str | int]:
    return machine()


def pytest_benchmark_update_commit_info(commit_info: dict[str, Any]) -> None:
    for key in ("project", "branch"):  # the names of a folder and a branch say nothing about a figure
        commit_info.pop(key, None)


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    output_json["peers"] = found()
    output_json["cases"] = [as_json(result) for result in _measured.values() if result]
