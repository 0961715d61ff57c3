"""The frame of the GPU times: what a failing case leaves behind, the order, and the file after each row."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.core.operation import Absent, Shape
from bench.gpu import check as gpu_check
from bench.gpu import results as gpu_results
from bench.gpu import times
from bench.gpu.case import Calls, GpuCase
from bench.gpu.results import Results
from bench.gpu.rounds import Rounds, as_json, line, measure
from bench.reports import readme
from bench.reports.compare import changes

ONE_ROUND = Rounds(0.0, 1)


def calls(shape: Shape, device: str) -> Calls:
    """Calls of which a peer breaks and another is absent."""
    x = torch.ones(shape.N, device=device)

    def broken() -> None:
        raise RuntimeError("illegal memory access\nsecond line")

    def late() -> None:
        raise Absent("it needs nvcc")

    return Calls(
        {"fastalign": x.sum, "fastalign, twice": lambda: 2 * x.sum()},
        {"one read": x.amax},
        {"PyTorch": x.mean, "broken": broken, "late": late},
        compiled={"torch.compile": x.prod},
        absent={"FlashInfer": "not installed"},
    )


SMALL = GpuCase("sum", Shape(2**40, 0, 0), calls, "fp32", tiny=Shape(4, 0, 0), compiles=True)


def test_a_case_has_times_of_what_ran_and_reasons_for_the_rest() -> None:
    measured = measure(SMALL, "cpu", Rounds(0.0, 3))
    seconds = {name: row.timing and len(row.timing.seconds) for name, row in measured.rows.items()}
    assert seconds == {
        "one read": 3,
        "fastalign": 3,
        "fastalign, twice": 3,
        "PyTorch": 3,
        "broken": None,
        "late": None,
        "FlashInfer": None,
    }
    assert measured.rows["broken"].refused == "failed: RuntimeError: illegal memory access"
    assert measured.rows["late"].refused == "absent: it needs nvcc"
    assert measured.failed == []
    assert "broken: failed" in line(measured) and "FlashInfer" not in line(measured)


def test_a_case_whose_inputs_fail_is_a_failure_of_ours() -> None:
    def make(shape: Shape, device: str) -> Calls:
        raise torch.OutOfMemoryError("no memory")

    measured = measure(SMALL._replace(make=make), "cpu", ONE_ROUND)
    assert measured.failed == ["fastalign"]
    assert as_json(measured)["rows"]["fastalign"]["refused"] == "failed: OutOfMemoryError: no memory"


def test_compiled_calls_come_last_beside_ours_and_the_ceiling() -> None:
    other = SMALL._replace(name="other", compiles=False)
    measured = list(times.timed({"a": [SMALL], "b": [other]}, "cpu", ONE_ROUND, 60))
    assert [case.name for case in measured] == ["sum", "other", "sum, compiled"]
    assert list(measured[-1].rows) == ["one read", "fastalign", "fastalign, twice", "torch.compile"]


def test_a_slow_section_leaves_the_others_their_share_and_what_did_not_run_is_named() -> None:
    def slow(shape: Shape, device: str) -> Calls:
        time.sleep(0.25)
        return calls(shape, device)

    first = [SMALL._replace(name=f"slow {number}", make=slow, compiles=False) for number in range(4)]
    second = [SMALL._replace(compiles=False)]
    measured = {case.name: case for case in times.timed({"a": first, "b": second}, "cpu", ONE_ROUND, 0.6)}
    assert measured["slow 3"].rows["fastalign"].refused == times.OUT_OF_TIME
    assert measured["sum"].failed == []


def test_the_file_holds_each_row_as_soon_as_it_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "gpu" / "results.json"
    results = Results(path)
    for entry in (as_json(measure(SMALL, "cpu", Rounds(0.0, 2))), {"name": "tests", "status": "ok"}):
        results.add("cases" if "rows" in entry else "checks", entry)
    Results(path).add("checks", {"name": "tests", "status": "failed"})  # the second call of a check
    found = json.loads(path.read_text())
    assert [case["name"] for case in found["cases"]] == ["sum"]
    assert found["checks"] == [{"name": "tests", "status": "failed"}]
    assert changes(found, found)[0] == []  # bench.reports.compare reads it


def test_results_of_two_machines_do_not_share_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    Results(path).add("checks", {"name": "tests"})
    here = gpu_results.machine()
    monkeypatch.setattr(gpu_results, "machine", lambda: here | {"gpu": "NVIDIA B200"})
    with pytest.raises(ValueError, match="got results of gpu .*, expected NVIDIA B200"):
        Results(path)


def test_each_section_is_found_and_its_names_are_unique() -> None:
    names = [case.name for cases in times.sections("").values() for case in cases]
    assert len(names) == len(set(names)) > 40
    assert set(times.sections("")) == set(times.SECTIONS)


def test_a_dry_run_takes_a_cpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = tmp_path / "times.json"
    assert times.main(["--dry-run", "--only", "masked_whiten", "--output", str(output)]) == 0
    assert "masked_whiten fp32: a copy of the inputs" in capsys.readouterr().out
    assert json.loads(output.read_text())["cases"][0]["rows"]["fastalign"]["seconds"]


def test_the_figures_of_the_first_gpu_are_those_of_cases_of_today() -> None:
    page = json.loads((gpu_check.RESULTS / "h200-2026-11-26.json").read_text())
    cases = [case for cases in times.sections("").values() for case in cases]
    names = {case.name for case in cases} | {f"{case.name}, compiled" for case in cases if case.compiles}
    assert {case["name"] for case in page["cases"]} <= names
    shapes = {case.name: case.shape._asdict() for case in cases}
    for case in page["cases"]:
        assert case["shape"] == shapes[case["name"].removesuffix(", compiled")], case["name"]
    assert changes(page, page)[0] == []


def test_half_a_file_fills_the_tables_of_readme() -> None:
    """The figures of the first GPU have no errors, no steps, and no plain sampler."""
    page = json.loads((gpu_check.RESULTS / "h200-2026-11-26.json").read_text())
    whole = {kind: table(page) for kind, table in readme.KINDS.items()}
    assert "| **65.6** (3,796)" not in whole["summary"] and "| 66 (3,796) |" in whole["summary"]
    assert "gradient error" not in whole["head"]
    nothing = {kind: table(page | {"cases": []}) for kind, table in readme.KINDS.items()}
    assert all("NVIDIA H200" in nothing[kind] for kind in ("summary", "head", "losses", "steps"))
    assert whole["sampling"] == nothing["sampling"] == "Not measured.\n"


def test_after_a_case_that_ends_its_process_the_next_ones_run(tmp_path: Path) -> None:
    path = tmp_path / "begun"
    cases = {"a": [SMALL._replace(name=name, compiles=False) for name in ("first", "dying", "last")]}
    rounds = times.timed(cases, "cpu", ONE_ROUND, 60, times.Begun(path))
    assert next(rounds).name == "first"
    times.Begun(path).add("dying")  # and the process dies
    rest = list(times.timed(cases, "cpu", ONE_ROUND, 60, times.Begun(path)))
    assert [(case.name, case.failed) for case in rest] == [("dying", ["fastalign"]), ("last", [])]
    assert rest[0].rows["fastalign"].refused == times.DIED


def test_a_process_that_dies_is_followed_by_another(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    commands: list[tuple[str, ...]] = []

    def run(command: tuple[str, ...]) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=-6 if len(commands) == 1 else 0)

    monkeypatch.setattr(times.subprocess, "run", run)
    assert times.supervise(["--only", "head"], 60) == 1  # a case died
    assert len(commands) == 2 and commands[0][-1] == commands[1][-1]
    assert "ended with status -6" in capfd.readouterr().out
