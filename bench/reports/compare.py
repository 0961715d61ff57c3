"""Regressions between two results files: `python -m bench.reports.compare BEFORE.json AFTER.json`; exit status 1 on
one.

Times are compared twice: as multiples of the case's first ceiling, round by round, so that a machine that was
slow for one of the runs does not count, and as they are, so that a ceiling that moved by itself does not. A
row is slower when both grew by more than their noise: the interquartile ranges of the two runs' rounds, added
up, and at least `LEAST_NOISE`, for a run's median moves more than its rounds tell. Where only the multiple
moved, the row is named. Only our rows decide the exit status.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..core.operation import is_ours

LEAST_NOISE = 0.10
MORE_MIB = 4.0  # that a peak may grow beside a tenth of it: what a process's resident set moves by
WORSE_ERROR = 2.0  # times; below EXACT, in parts of the largest true value, nobody minds
EXACT = 4 * 2**-23
SAME = (
    "cpu",
    "gpu",
    "threads",
    "torch",
    "triton",
)  # entries of machine_info without which figures say nothing of the code


class Spread(NamedTuple):
    """Median over the rounds, and their interquartile range as a share of it."""

    median: float
    noise: float

    @staticmethod
    def of(rounds: Sequence[float]) -> Spread:
        low, median, high = statistics.quantiles(rounds, n=4, method="inclusive")
        return Spread(median, (high - low) / median)

    def moved(self, later: Spread) -> int:
        """1: `later` is larger beyond the noise of both; -1: smaller; 0: neither."""
        beyond, growth = 1 + self.with_noise_of(later), later.median / self.median
        return (growth > beyond) - (growth < 1 / beyond)

    def with_noise_of(self, later: Spread) -> float:
        return max(LEAST_NOISE, self.noise + later.noise)


class Change(NamedTuple):
    """What differs between the two files for one row; regression: it is ours and worse beyond the noise."""

    case: str
    row: str
    text: str
    regression: bool


def multiple(case: Mapping[str, Any], row: str) -> Spread | None:
    """A row's time as a multiple of the ceiling's; None for a row, or a ceiling, without figures."""
    own, ceiling = case["rows"][row]["seconds"], case["rows"][case["ceilings"][0]]["seconds"]
    return Spread.of([a / b for a, b in zip(own, ceiling, strict=True)]) if own and ceiling else None


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[list[Change], list[str]]:
    """The rows that changed beyond the noise, and what could not be compared or only by a wide margin."""
    older, newer = ({case["name"]: case for case in results["cases"]} for results in (before, after))
    found: list[Change] = []
    notes = [f"{key}: {before['machine_info'].get(key)} before, {after['machine_info'].get(key)} after; times do not compare"
             for key in SAME if before["machine_info"].get(key) != after["machine_info"].get(key)]  # fmt: skip
    notes += [
        f"{name}: only in the {where} file"
        for where, a, b in (("first", older, newer), ("second", newer, older))
        for name in a.keys() - b.keys()
    ]
    for name in older.keys() & newer.keys():
        if older[name]["shape"] != newer[name]["shape"]:
            notes.append(f"{name}: {older[name]['shape']} before, {newer[name]['shape']} after; not compared")
            continue
        for row in older[name]["rows"].keys() & newer[name]["rows"].keys():
            own, noise = _row(older[name], newer[name], row)
            found += own
            notes += noise
    return sorted(found), sorted(notes)


def _row(older: Mapping[str, Any], newer: Mapping[str, Any], row: str) -> tuple[list[Change], list[str]]:
    case, ours = older["name"], is_ours(row)
    a, b = older["rows"][row], newer["rows"][row]
    if bool(a["refused"]) != bool(b["refused"]):
        gone = bool(b["refused"])
        text = f"measured before, now {b['refused']}" if gone else f"measured now, before {a['refused']}"
        return [Change(case, row, text, ours and gone)], []
    found, notes = [], []
    was, now = multiple(older, row), multiple(newer, row)
    if was and now and row != older["ceilings"][0]:
        noise, moved = was.with_noise_of(now), was.moved(now)
        text = f"{was.median:.3g} -> {now.median:.3g} times {older['ceilings'][0]} (noise {noise:.0%})"
        seconds, later = Spread.of(a["seconds"]), Spread.of(b["seconds"])
        if moved and seconds.moved(later) == moved:
            found.append(
                Change(case, row, f"{'slower' if moved > 0 else 'faster'}: {text}", ours and moved > 0)
            )
        elif moved:
            notes.append(
                f"{case}, {row}: {text}, but {seconds.median * 1e3:.3g} -> {later.median * 1e3:.3g} ms: the ceiling moved"
            )
        elif noise > LEAST_NOISE:
            notes.append(f"{case}, {row}: too noisy to tell 10 %: {text}")
    if a["peak_mib"] is not None and b["peak_mib"] is not None:
        grown, shrunk = (
            y > x * (1 + LEAST_NOISE) + MORE_MIB
            for x, y in ((a["peak_mib"], b["peak_mib"]), (b["peak_mib"], a["peak_mib"]))
        )
        if grown or shrunk:
            found.append(
                Change(case, row, f"peak {a['peak_mib']:,.0f} -> {b['peak_mib']:,.0f} MiB", ours and grown)
            )
    for kind in a["errors"].keys() & b["errors"].keys():
        was_off, now_off = (max(side["errors"][kind]["relative"], EXACT) for side in (a, b))
        if now_off > WORSE_ERROR * was_off:
            found.append(Change(case, row, f"error of {kind} {was_off:.1e} -> {now_off:.1e}", ours))
    return found, notes


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.reports.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    given = parser.parse_args(argv)
    found, notes = changes(json.loads(given.before.read_text()), json.loads(given.after.read_text()))
    for note in notes:
        print(f"note: {note}")
    for change in found:
        print(
            f"{'REGRESSION' if change.regression else 'change'}: {change.case}, {change.row}: {change.text}"
        )
    worse = sum(change.regression for change in found)
    print(f"{worse} regressions, {len(found) - worse} other changes")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
