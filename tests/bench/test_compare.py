"""bench.reports.compare tells a slower kernel from a slower machine, and exits with 1 on the first alone."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from bench.core.operation import EAGER, OURS
from bench.reports import compare


def results(
    ours: tuple[float, ...] = (1.0, 1.02, 0.98),
    peak: float = 100.0,
    machine: float = 1.0,
    ceiling: float = 0.5,
) -> dict[str, Any]:
    def row(seconds: tuple[float, ...]) -> dict[str, Any]:
        scaled = [machine * s for s in seconds]
        return {
            "refused": "",
            "seconds": scaled,
            "errors": {"d weight": {"absolute": 1e-3, "relative": 1e-5}},
            "peak_mib": peak,
        }

    rows = {"copy": row((ceiling,) * 3), OURS: row(ours), EAGER: row((2.0, 2.0, 2.0))}
    case = {"name": "loss fp32", "shape": {"N": 8, "H": 4, "V": 99}, "ceilings": ["copy"], "rows": rows}
    return {
        "machine_info": {"cpu": "A", "gpu": "none", "threads": 2, "torch": "2", "triton": "3"},
        "cases": [case],
    }


def status(before: dict[str, Any], after: dict[str, Any], folder: Path) -> int:
    files = []
    for name, content in (("before", before), ("after", after)):
        files.append(folder / f"{name}.json")
        files[-1].write_text(json.dumps(content))
    return compare.main([str(file) for file in files])


def test_a_slower_row_of_ours_is_a_regression_and_a_slower_machine_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(results(), results((1.2, 1.22, 1.18)), tmp_path) == 1
    assert (
        f"REGRESSION: loss fp32, {OURS}: slower: 2 -> 2.4 times copy (noise 10%)" in capsys.readouterr().out
    )
    assert status(results(), results(machine=3.0), tmp_path) == 0
    assert status(results((1.2, 1.22, 1.18)), results(), tmp_path) == 0
    assert f"change: loss fp32, {OURS}: faster" in capsys.readouterr().out


def test_what_the_rounds_spread_by_is_no_regression_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noisy = results((0.9, 1.2, 1.5))
    assert status(results(), noisy, tmp_path) == 0
    assert (
        f"note: loss fp32, {OURS}: too noisy to tell 10 %: 2 -> 2.4 times copy (noise 27%)"
        in capsys.readouterr().out
    )


def test_a_ceiling_that_moved_by_itself_is_no_regression_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(results(), results(ceiling=0.3), tmp_path) == 0
    assert (
        f"note: loss fp32, {OURS}: 2 -> 3.33 times copy (noise 10%), but 1e+03 -> 1e+03 ms: the ceiling moved"
        in capsys.readouterr().out
    )
    assert status(results(), results((1.2, 1.22, 1.18), ceiling=0.3), tmp_path) == 1  # both moved


def test_a_row_with_an_option_of_ours_is_ours() -> None:
    before, after = results(), results((1.2, 1.22, 1.18))
    for file in (before, after):
        rows = file["cases"][0]["rows"]
        rows[f"{OURS}, tail_eps 2**-14"] = rows.pop(OURS)
    assert [change.regression for change in compare.changes(before, after)[0]] == [True]


def test_a_peer_that_got_slower_is_told_and_decides_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    after = results()
    after["cases"][0]["rows"][EAGER]["seconds"] = [3.0, 3.0, 3.0]
    assert status(results(), after, tmp_path) == 0
    assert f"change: loss fp32, {EAGER}: slower" in capsys.readouterr().out


def test_memory_errors_and_refusals_regress_too() -> None:
    assert [c.text for c in compare.changes(results(), results(peak=115.0))[0] if c.regression] == [
        "peak 100 -> 115 MiB"
    ]
    assert not compare.changes(results(peak=20.0), results(peak=25.0))[
        0
    ]  # a process's resident set moves by as much
    after = results()
    after["cases"][0]["rows"][OURS]["errors"]["d weight"]["relative"] = 3e-5
    assert [c.text for c in compare.changes(results(), after)[0]] == ["error of d weight 1.0e-05 -> 3.0e-05"]
    refused = copy.deepcopy(results())
    refused["cases"][0]["rows"][OURS] |= {
        "refused": "wrong: loss",
        "seconds": [],
        "errors": {},
        "peak_mib": None,
    }
    (change,) = compare.changes(results(), refused)[0]
    assert change.regression and change.text == "measured before, now wrong: loss"
    assert not compare.changes(refused, results())[0][0].regression


def test_what_does_not_compare_is_named() -> None:
    other = results()
    other["machine_info"]["cpu"] = "B"
    other["cases"][0]["shape"] = {"N": 16, "H": 4, "V": 99}
    notes = compare.changes(results(), other)[1]
    assert notes[0].startswith("cpu: A before, B after") and notes[1].endswith("not compared")
    other["cases"][0]["name"] = "another"
    assert {"another: only in the second file", "loss fp32: only in the first file"} <= set(
        compare.changes(results(), other)[1]
    )


def test_figures_noted_by_hand_compare_though_they_have_one_round_and_no_ceiling(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noted, newer = results((1.0,), ceiling=0.5), results((1.3, 1.3, 1.3))
    assert status(noted, newer, tmp_path) == 1  # one round of ours, three of the ceiling
    assert "slower: 2 -> 2.6 times copy" in capsys.readouterr().out
    noted["cases"][0]["ceilings"] = []
    assert status(noted, newer, tmp_path) == 1
    assert f"REGRESSION: loss fp32, {OURS}: slower: 1e+03 -> 1.3e+03 ms" in capsys.readouterr().out
    assert status(noted, results((0.8, 0.8, 0.8)), tmp_path) == 0


def test_the_processor_beside_a_gpu_does_not_matter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = results(), results()
    before["machine_info"] = {"gpu": "NVIDIA H200", "torch": "2", "triton": "3"}
    after["machine_info"] |= {"gpu": "NVIDIA H200", "torch": "2.1"}
    status(before, after, tmp_path)
    out = capsys.readouterr().out
    assert "torch: 2 before, 2.1 after" in out and "cpu" not in out and "threads" not in out
