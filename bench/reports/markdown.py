"""Write a results file as Markdown: `python -m bench.reports.markdown FILE.json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastalign.measure import Timing

from ..core.operation import OURS, is_ours


def render(results: Mapping[str, Any]) -> str:
    """The report of a results file: the machine, a table for each case, and the targets."""
    info = results["machine_info"]
    known = ", ".join(f"{key} {value}" for key, value in info.items() if key not in ("cpu", "gpu"))
    head = (
        f"Measured on {info['cpu']}"
        + (f" and {info['gpu']}" if info["gpu"] != "none" else "")
        + f" ({known})."
    )
    if "peers" in results:
        head += " Peers: " + "; ".join(f"{name} {state}" for name, state in results["peers"].items()) + "."
    checks = [
        f"- {check['name']}: {check['status']}, {check['seconds']} s" for check in results.get("checks", [])
    ]
    parts = ["### Checks\n\n" + "\n".join(checks)] if checks else []
    return (
        "\n\n".join(
            [
                head,
                *parts,
                *(render_case(case) for case in results["cases"]),
                "### Targets\n\n" + targets(results),
            ]
        )
        + "\n"
    )


def targets(results: Mapping[str, Any]) -> str:
    """One line for each target: the figure, the limit, and whether it is met."""
    return "\n".join(f"- {line}" for case in results["cases"] for line in target_lines(case))


def render_case(case: Mapping[str, Any]) -> str:
    """The table of a case, the fastest row first, with the reasons of the rows that have no figures."""
    rows: Mapping[str, Any] = case["rows"]
    timings = {name: Timing.of(row["seconds"]) for name, row in rows.items() if row["seconds"]}
    ceiling = case["ceilings"][0]
    kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row["errors"]))
    memory = any(row["peak_mib"] is not None for row in rows.values())
    columns = [
        "method",
        "ms, median (min to max)",
        f"times {ceiling}",
        *(["peak MiB beyond inputs"] if memory else []),
        *(f"error, {kind}" for kind in kinds),
    ]
    lines = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    for name in sorted(timings, key=lambda name: timings[name].median):
        timing, row = timings[name], rows[name]
        cells = [
            name,
            f"{_ms(timing.median)} ({_ms(timing.minimum)} to {_ms(timing.maximum)})",
            f"{timing.over(timings[ceiling]):.2f}",
        ]
        if memory:
            cells.append("" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}")
        cells += [f"{row['errors'][kind]['relative']:.1e}" if kind in row["errors"] else "" for kind in kinds]
        lines.append(f"| {' | '.join(f'**{cell}**' if is_ours(name) and cell else cell for cell in cells)} |")
    shape = ", ".join(
        f"{letter} {size}"
        for letter, size in case["shape"].items()
        if size and (letter != "H" or _has_hidden(case["operation"]))
    )
    rounds = max((len(row["seconds"]) for row in rows.values()), default=0)
    what = "forward and backward of " + ", ".join(case["trained"]) if case["trained"] else "no gradients"
    what = "forward, backward and optimizer" if case["operation"].endswith("step") else what
    reasons: dict[str, list[str]] = {}
    for name, row in rows.items():
        if row["refused"]:
            reasons.setdefault(row["refused"], []).append(name)
    notes = [f"- {', '.join(names)}: {reason}" for reason, names in reasons.items()] + [
        f"- {note}" for note in case["notes"]
    ]
    parts = [
        [f"### {case['name']}"],
        [f"{shape}; {what}; {rounds} interleaved rounds."],
        lines if timings else [],
        notes,
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _has_hidden(operation: str) -> bool:
    """Whether H matters; an operation on logits takes its N and V from a head's shape."""
    return operation.startswith("linear") or operation.endswith("step")


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.2f}"


def target_lines(case: Mapping[str, Any]) -> list[str]:
    """The targets of a case in words; a target whose figures are missing says so."""
    return [f"{case['name']}: {_target_line(case, target)}" for target in case["targets"]]


def _target_line(case: Mapping[str, Any], target: Mapping[str, Any]) -> str:
    quantity, limit, over = target["quantity"], target["limit"], target["over"]
    row = target.get("row", OURS)
    ours, other = case["rows"][row], case["rows"].get(over)
    if ours["refused"]:
        return f"{ours['refused']}: {'not measured' if ours['refused'].startswith('absent') else 'missed'}"
    if quantity == "memory":
        if ours["peak_mib"] is None:
            return "peak memory was not measured"
        results, value = ours["results_mib"], ours["peak_mib"] - ours["results_mib"]
        text = f"peak memory {results:,.0f} MiB of results + {value:,.0f} MiB (target + {limit:g})"
    elif quantity == "growth":
        if ours["longer_mib"] is None:
            return f"peak memory at {case['longer']} times the tokens was not measured"
        value = _over(ours["longer_mib"], ours["peak_mib"] - ours["results_mib"])
        text = (
            f"{ours['longer_mib']:,.0f} MiB beyond results at {case['longer']} x N, "
            f"{value:.2f} times N's (target <= {limit:g})"
        )
    elif other is None or other["refused"]:
        reason = other["refused"] if other else "no such row"
        return f"{quantity} against {over} was not measured: {reason}"
    elif quantity == "time":
        value = Timing.of(ours["seconds"]).over(Timing.of(other["seconds"]))
        text = f"{value:.3g} times {over} (target <= {limit:.3g})"
    else:
        errors = {kind: error for kind, error in ours["errors"].items() if kind != "loss"}
        value = max(
            _over(error["absolute"], other["errors"][kind]["absolute"]) for kind, error in errors.items()
        )
        text = f"largest error {value:.2f} times that of {over} (target <= {limit:g})"
    what = "" if row == OURS else f"{row}: "
    return f"{what}{text}: {'met' if value <= limit else 'missed'}"


def _over(error: float, other: float) -> float:
    return error / other if other else (0.0 if error == 0 else float("inf"))


def main(argv: list[str]) -> None:
    if len(argv) != 1:
        raise SystemExit("usage: python -m bench.reports.markdown RESULTS.json")
    print(render(json.loads(Path(argv[0]).read_text())), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
