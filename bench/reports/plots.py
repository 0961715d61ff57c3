"""Plot a results file: `python -m bench.reports.plots FILE.json`.

The plots lie next to the file: time against memory, time against N and V, memory against N.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..core.operation import OURS

SCALED = "linear_cross_entropy"  # the operation of cases/bench_scaling.py


def draw(results: Mapping[str, Any], file: Path) -> list[Path]:
    """Write the plots that the file has figures for, as PNG; needs matplotlib."""
    plots = {"time-memory": _time_memory, "scaling": _scaling}
    drawn = []
    for name, plot in plots.items():
        figure = plot(results)
        if figure is not None:
            drawn.append(file.with_name(f"{file.stem}-{name}.png"))
            figure.savefig(drawn[-1], dpi=120)
    return drawn


def _time_memory(results: Mapping[str, Any]) -> Any:
    """One panel for each case, one point for each method; the lower left is best."""
    panels = {}
    for case in results["cases"]:
        points = {
            name: (row["peak_mib"], 1e3 * statistics.median(row["seconds"]))
            for name, row in case["rows"].items()
            if row["peak_mib"] is not None and row["seconds"]
        }
        if len(points) > 3:  # for fewer methods a table says as much
            panels[case["name"]] = points
    if not panels:
        return None
    figure, axes = _axes(len(panels))
    for axis, (name, points) in zip(axes, panels.items()):
        for method, (mib, ms) in points.items():
            axis.plot(mib, ms, "o", color="C3" if method == OURS else "C0")
            axis.annotate(method, (mib, ms), textcoords="offset points", xytext=(4, 4), fontsize=6)
        axis.set(title=name, xlabel="peak MiB beyond inputs", ylabel="ms", xscale="log", yscale="log")
        axis.title.set_fontsize(8)
        axis.margins(x=0.4, y=0.15)
    return figure


def _scaling(results: Mapping[str, Any]) -> Any:
    """Time against N, time against V, and peak memory against N; the rest as in the plain case."""
    dtype = "fp32" if results["machine_info"]["gpu"] == "none" else "bf16"
    trained = ["hidden", "weight"]
    cases = [
        case
        for case in results["cases"]
        if (case["operation"], case["dtype"], case["trained"]) == (SCALED, dtype, trained)
    ]
    plain = next((case["shape"] for case in cases if case["name"] == f"{SCALED} {dtype}"), None)
    if plain is None:
        return None

    def lines(
        letter: str, value: Callable[[Mapping[str, Any]], float | None]
    ) -> dict[str, list[tuple[int, float]]]:
        fixed = {key: size for key, size in plain.items() if key != letter}
        alike = [case for case in cases if {**case["shape"], **fixed} == case["shape"]]
        names = [name for name in alike[0]["rows"] if all(name in case["rows"] for case in alike)]
        found = {
            name: sorted((c["shape"][letter], v) for c in alike if (v := value(c["rows"][name])) is not None)
            for name in names
        }
        return {name: points for name, points in found.items() if len(points) > 1}

    def milliseconds(row: Mapping[str, Any]) -> float | None:
        return 1e3 * statistics.median(row["seconds"]) if row["seconds"] else None

    panels = [
        ("N, tokens", "ms", lines("N", milliseconds)),
        ("V, vocabulary", "ms", lines("V", milliseconds)),
        ("N, tokens of a sequence", "peak MiB beyond inputs", lines("N", lambda row: row["peak_mib"])),
    ]
    if not panels[0][2]:
        return None
    figure, axes = _axes(len(panels))
    for axis, (x, y, curves) in zip(axes, panels):
        for name, points in curves.items():
            axis.plot(*zip(*points), marker="o", label=name, linewidth=2 if name == OURS else 1)
        axis.set(xlabel=x, ylabel=y, xscale="log", yscale="log")
        axis.legend(fontsize=6)
    sizes = ", ".join(f"{key} {size}" for key, size in plain.items())
    figure.suptitle(f"{SCALED} {dtype}, forward and backward; else {sizes}", fontsize=9)
    return figure


def _axes(panels: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    columns = min(panels, 3)
    rows = -(-panels // columns)
    figure = Figure(figsize=(5 * columns, 4 * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)[:panels]


def main(argv: list[str]) -> None:
    if len(argv) != 1:
        raise SystemExit("usage: python -m bench.reports.plots RESULTS.json")
    for path in draw(json.loads(Path(argv[0]).read_text()), Path(argv[0])):
        print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
