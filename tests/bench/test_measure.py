"""Timing in interleaved rounds, peak memory in a fresh process, errors against fp64, and what is said of the
machine."""

import getpass
import math
import platform
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastalign import measure
from fastalign.measure import (
    Error,
    PeakMemoryUnavailable,
    Timing,
    interleaved,
    largest_error,
    machine,
    peak_memories,
    peak_memory,
)

MIB = 2**20
linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(),
    reason="peak memory of a process needs Linux's /proc/self/clear_refs",
)
TARGETS = f"""
import os

import torch

def filled(kept, freed, threads):
    assert torch.get_num_threads() == threads, torch.get_num_threads()
    inputs = torch.ones(300 * {MIB} // 4)  # made before the call
    def call():
        print("not an answer")
        os.write(1, b"neither is this")
        result = torch.ones(kept * {MIB} // 4)
        torch.ones(freed * {MIB} // 4)
        return result, inputs
    return call

def fails():
    def call():
        raise ValueError("no memory for you")
    return call
"""


@pytest.fixture
def targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "measured_targets.py").write_text(TARGETS)
    monkeypatch.syspath_prepend(tmp_path)
    return "measured_targets"


def test_rounds_are_interleaved_and_warm_up_rounds_do_not_count() -> None:
    order: list[str] = []
    timings = interleaved({name: lambda name=name: order.append(name) for name in "ABC"}, rounds=3, warmup=2)  # type: ignore[misc]
    assert "".join(order) == "ABC" * 5
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"A": 3, "B": 3, "C": 3}


@pytest.fixture
def host_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of a process without CUDA, on machines with it too."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)


@pytest.mark.usefixtures("host_clock")
def test_a_timing_is_what_the_clock_said(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0, 9, 9, 10, 20, 22, 30, 37])  # the first reading pair is the warm-up
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    assert interleaved({"A": lambda: None}, rounds=3) == {"A": Timing(2, 1, 7, (1, 2, 7))}


@pytest.mark.usefixtures("host_clock")
def test_a_cold_clock_reads_other_memory_before_each_call_and_does_not_count_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str | int] = []
    monkeypatch.setattr(torch.Tensor, "sum", lambda self: order.append(self.nbytes // MIB) or self.amax())  # type: ignore[func-returns-value]
    timings = interleaved({name: partial(order.append, name) for name in "AB"}, rounds=2, warmup=0, cold=True)
    assert order == [256, "A", 256, "B"] * 2
    assert all(timing.minimum < 1e-3 for timing in timings.values())  # a read of 256 MiB takes longer


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpus_own_events_tell_the_time() -> None:
    x = torch.ones(
        2**28, device="cuda"
    )  # 1 GiB: a read and a write take 0.2 to 4 ms on anything from a T4 to a B200
    timings = interleaved(
        {"once": lambda: x.clone(), "thrice": lambda: [x.clone() for _ in range(3)]}, rounds=9, warmup=2
    )
    assert 1e-4 < timings["once"].median < 2e-2 and 2 < timings["thrice"].over(timings["once"]) < 4


def test_a_ratio_is_taken_round_by_round() -> None:
    slow_phase = Timing.of([1.0, 10.0, 1.0])
    other = Timing.of([2.0, 20.0, 0.5])
    assert other.over(slow_phase) == 2.0
    with pytest.raises(ValueError, match="shorter|longer"):
        other.over(Timing.of([1.0]))


@pytest.mark.parametrize(("rounds", "warmup", "named"), [(0, 1, "rounds: got 0"), (1, -1, "warmup: got -1")])
def test_impossible_rounds_are_refused(rounds: int, warmup: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        interleaved({"A": lambda: None}, rounds, warmup)


@linux
def test_peak_memory_counts_results_and_what_is_freed_on_the_way_but_no_inputs(targets: str) -> None:
    arguments = {"kept": 120, "freed": 80, "threads": torch.get_num_threads()}
    assert peak_memory(
        f"{targets}:filled", arguments, warmup={**arguments, "kept": 1, "freed": 1}
    ) == pytest.approx(200, rel=0.1)


@linux
def test_calls_that_share_a_process_are_measured_apart(targets: str) -> None:
    calls = [
        {"kept": kept, "freed": freed, "threads": torch.get_num_threads()}
        for kept, freed in ((120, 80), (10, 40), (60, 90))
    ]
    found = peak_memories(f"{targets}:filled", calls, warmup=calls[1])
    assert found == [pytest.approx(call["kept"] + call["freed"], rel=0.1) for call in calls]


@linux
def test_a_failing_call_is_told_with_its_reason(targets: str) -> None:
    with pytest.raises(
        RuntimeError,
        match=r"target: got a failure of .*measured_targets:fails [\s\S]*ValueError: no memory for you",
    ):
        peak_memory(f"{targets}:fails", {})


def test_where_there_is_no_way_to_tell_it_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(measure, "_CLEAR_REFS", tmp_path / "clear_refs")
    with pytest.raises(PeakMemoryUnavailable, match=platform.system()):
        peak_memory("nowhere:nothing", {})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_on_a_gpu(targets: str, tmp_path: Path) -> None:
    (tmp_path / "measured_gpu.py").write_text(
        "import torch\n"
        f"def filled(mib):\n    return lambda: torch.ones(mib * {MIB} // 4, device='cuda').add(1)\n"
    )
    assert peak_memory("measured_gpu:filled", {"mib": 64}, device="cuda") == 128  # the ones and the sum


def test_largest_error_is_elementwise_absolute_and_relative_to_the_largest() -> None:
    reference = {
        "loss": torch.tensor(4.0, dtype=torch.float64),
        "grad": torch.tensor([[1.0, -8.0], [2.0, 0.0]], dtype=torch.float64),
        "unused": torch.zeros(1),
    }
    results = {
        "loss": torch.tensor(3.0),
        "grad": torch.tensor([[1.0, -8.0], [2.5, 0.25]], dtype=torch.bfloat16),
    }
    assert largest_error(results, reference) == {"loss": Error(1.0, 0.25), "grad": Error(0.5, 0.0625)}


def test_largest_error_looks_at_every_row() -> None:
    reference = torch.ones(2500, 2, dtype=torch.float64)
    for row in (0, 1023, 1024, 2499):
        result = reference.float()
        result[row, 1] = 3
        assert largest_error({"x": result}, {"x": reference}) == {"x": Error(2.0, 2.0)}


def test_largest_error_of_nan_and_against_zero() -> None:
    nan = largest_error({"x": torch.tensor([1.0, math.nan])}, {"x": torch.ones(2)})["x"]
    assert math.isnan(nan.absolute) and math.isnan(nan.relative)
    assert largest_error({"x": torch.tensor([0.5])}, {"x": torch.zeros(1)})["x"] == Error(0.5, math.inf)
    assert largest_error({"x": torch.zeros(1)}, {"x": torch.zeros(1)})["x"] == Error(0.0, 0.0)


@pytest.mark.parametrize(
    ("result", "reference", "named"),
    [
        (torch.ones(2), {"y": torch.ones(2)}, "got 'x', expected names that the reference has"),
        (torch.ones(2), {"x": torch.ones(2, 1)}, r"got .x. of shape \[2\], expected \[2, 1\]"),
        (torch.ones(0), {"x": torch.ones(0)}, "expected at least one element"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    result: torch.Tensor, reference: dict[str, torch.Tensor], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        largest_error({"x": result}, reference)


def test_the_machine_is_described_without_names_of_host_user_or_path() -> None:
    info = machine()
    assert info["torch"] == torch.__version__ and info["threads"] == torch.get_num_threads()
    assert int(info["cores"]) >= 1
    assert (info["gpu"] == "none") == (not torch.cuda.is_available())
    text = " ".join(map(str, info.values()))
    assert (
        platform.node() not in text
        and str(Path.home()) not in text
        and f" {getpass.getuser()} " not in f" {text} "
    )


def test_the_machine_is_described_where_a_package_is_absent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(measure, "version", absent)
    assert machine()["triton"] == "not installed"


def test_a_gpus_clocks_are_told_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        assert machine()["clocks"] == machine()["cuda"] == "none"

    def smi(command: list[str], **_: object) -> SimpleNamespace:
        asked = command[1].removeprefix("--query-gpu=").split(",")
        return SimpleNamespace(stdout=", ".join(f"<{field}>" for field in asked) + "\n<second GPU>\n")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(measure.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(measure.subprocess, "run", smi)
    assert measure.clocks().startswith("clocks.sm <clocks.sm>, clocks.max.sm <clocks.max.sm>, ")
    assert measure._query("driver_version") == "<driver_version>"
