"""A pytest plugin for the tests of a GPU check: `-p bench.gpu.longest_first`.

It leaves out tests that do not use the device, and those marked cpu_only. It runs the longest first, so that
no worker is left with one of them at the end; the seconds come from an earlier run's file, and tests that are
not in it come last. It writes a file of this run: the outcomes, and for each slow test its seconds and
whether it used the GPU.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

EARLIER = Path(__file__).parents[1] / "results" / "gpu" / "test-seconds.json"
EVERY = 5.0  # seconds between two writes
LEAST = 0.5  # seconds of a test that the file names
NEEDS = re.compile("needs a (CUDA device|GPU)")
# The same of a file's text; `DEVICES` is a table of implementations and their devices.
OF_DEVICE = re.compile(
    rf"def test_\w+\([^)]*\bdevice\b|reason=\"{NEEDS.pattern}|^DEVICES = |columns_triton", re.MULTILINE
)
ALLOCATIONS = pytest.StashKey[int]()
ON_GPU = "on_gpu"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seconds-to", type=Path, help="write each test's seconds to this file")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--seconds-to")
    if path and not hasattr(config, "workerinput"):  # xdist's controller, or the only process
        config.pluginmanager.register(Seconds(path))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    earlier = json.loads(EARLIER.read_text())["tests"] if EARLIER.exists() else {}
    config.hook.pytest_deselected(items=[item for item in items if not uses_device(item)])
    items[:] = sorted(
        filter(uses_device, items), key=lambda item: -earlier.get(item.nodeid, {}).get("seconds", 0.0)
    )


def uses_device(item: pytest.Item) -> bool:
    """Whether the test takes the fixture `device`, says that it needs a GPU, or runs Triton's kernels."""
    if item.get_closest_marker("cpu_only"):
        return False
    reasons = [str(mark.kwargs.get("reason")) for mark in item.iter_markers("skipif")]
    fixtures = getattr(item, "fixturenames", ())
    return "device" in fixtures or "triton" in item.name or any(map(NEEDS.search, reasons))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[ALLOCATIONS] = _allocations()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    before = item.stash.get(ALLOCATIONS, 0)
    report.user_properties.append((ON_GPU, _allocations() > before))
    return report


def _allocations() -> int:
    """How often torch has allocated memory on the GPU."""
    return torch.cuda.memory_stats()["allocation.all.allocated"] if torch.cuda.is_initialized() else 0


class Seconds:
    """Writes the outcomes of the tests, and the seconds of the slow ones, longest first.

    It writes every few seconds, so that a run that is killed leaves what it knew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tests: dict[str, dict[str, Any]] = {}
        self.outcomes: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
        self._written = time.monotonic()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = self.tests.setdefault(report.nodeid, {"seconds": 0.0, ON_GPU: False})
        test["seconds"] += report.duration
        test[ON_GPU] |= dict(report.user_properties).get(ON_GPU, False)
        if report.when == "call" or not report.passed:
            self.outcomes[report.outcome].append(report.nodeid)
        if time.monotonic() - self._written > EVERY:
            self.pytest_sessionfinish()

    def pytest_sessionfinish(self) -> None:
        self._written = time.monotonic()
        slow = {name: test for name, test in self.tests.items() if test["seconds"] >= LEAST}
        longest = dict(sorted(slow.items(), key=lambda item: -item[1]["seconds"]))
        for test in longest.values():
            test["seconds"] = round(test["seconds"], 1)
        content = {
            **{outcome: len(names) for outcome, names in self.outcomes.items()},
            "failures": self.outcomes["failed"],
            "seconds": round(sum(test["seconds"] for test in self.tests.values()), 1),
            "tests": longest,
        }
        self.path.write_text(json.dumps(content, indent=1))
