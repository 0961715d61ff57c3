"""Plots of a results file: the ones that it has figures for, and no others."""

from pathlib import Path
from typing import Any

import pytest

from bench.reports import plots

pytest.importorskip("matplotlib", reason="plots need matplotlib, of the extra `bench`")


def case(
    name: str, shape: tuple[int, int, int], rows: dict[str, tuple[float, float | None]]
) -> dict[str, Any]:
    return {
        "name": name,
        "operation": "linear_cross_entropy",
        "dtype": "fp32",
        "trained": ["hidden", "weight"],
        "shape": dict(zip("NHV", shape)),
        "rows": {
            method: {"seconds": [seconds] * 3, "peak_mib": mib} for method, (seconds, mib) in rows.items()
        },
    }


INFO = {"machine_info": {"gpu": "none"}}
METHODS: dict[str, tuple[float, float | None]] = {
    "fastalign": (1.0, 10.0),
    "PyTorch": (2.0, 30.0),
    "other": (3.0, 20.0),
    "more": (4.0, 5.0),
}
PLAIN = case("linear_cross_entropy fp32", (64, 8, 100), {**METHODS, "3 bare GEMMs": (0.5, None)})
LONGER = case("twice the tokens", (128, 8, 100), {"fastalign": (2.0, 11.0), "PyTorch": (4.0, 60.0)})
WIDER = case("twice the ids", (64, 8, 200), {"fastalign": (2.0, 12.0), "PyTorch": (4.0, 70.0)})


def test_both_plots_are_drawn_beside_the_file(tmp_path: Path) -> None:
    drawn = plots.draw({**INFO, "cases": [PLAIN, LONGER, WIDER]}, tmp_path / "results.json")
    assert [path.name for path in drawn] == ["results-time-memory.png", "results-scaling.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_what_a_file_has_no_figures_for_is_not_drawn(tmp_path: Path) -> None:
    assert [path.name for path in plots.draw({**INFO, "cases": [PLAIN]}, tmp_path / "results.json")] == [
        "results-time-memory.png"
    ]
    assert plots.draw({**INFO, "cases": [LONGER]}, tmp_path / "results.json") == []


def test_scaling_takes_the_cases_that_differ_in_one_size_alone() -> None:
    other = case("another head", (64, 16, 200), {"fastalign": (9.0, 9.0), "PyTorch": (9.0, 9.0)})
    figure = plots._scaling({**INFO, "cases": [PLAIN, LONGER, WIDER, other]})
    by_tokens, by_vocabulary, memory = figure.axes
    assert {line.get_label(): line.get_xydata().tolist() for line in by_tokens.lines} == {
        "fastalign": [[64, 1000], [128, 2000]],
        "PyTorch": [[64, 2000], [128, 4000]],
    }
    assert by_vocabulary.lines[0].get_xydata().tolist() == [[100, 1000], [200, 2000]]
    assert memory.lines[1].get_xydata().tolist() == [[64, 30], [128, 60]]
