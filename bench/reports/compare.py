"""Find regressions between two results files: `python -m bench.reports.compare BEFORE.json AFTER.json`.

Times are compared twice. As multiples of the case's first ceiling, round by round: this removes a machine
that was slow for one run. As they are: this removes a ceiling that moved by itself. A row is slower if both
grew by more than the noise, which is the sum of the interquartile ranges of both runs' rounds and at least
LEAST_NOISE, because a run's median moves more than its rounds show. A row whose multiple alone moved is
named. Where a file has no ceiling, as figures noted by hand, times are compared as they are. The exit status
is 1 if one of our rows regressed; peers do not count.
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
MORE_MIB = 4.0  # a peak may grow by this and a tenth: a process's resident set moves as much
WORSE_ERROR = (
    2.0  # factor of a regression; errors below EXACT, relative to the largest true value, do not count
)
EXACT = 4 * 2**-23
# Entries of machine_info that must agree for figures to say something about the code, without and with a GPU.
SAME = ("cpu", "cpu_model", "cpu_capability", "gpu", "threads", "torch", "triton")
SAME_GPU = ("gpu", "torch", "triton")


class Spread(NamedTuple):
    """The median of the rounds, and their interquartile range as a share of it."""

    median: float
    noise: float

    @staticmethod
    def of(rounds: Sequence[float]) -> Spread:
        """The spread of the rounds; its noise is 0 for one round, which has none that is known."""
        if len(rounds) == 1:
            return Spread(rounds[0], 0.0)
        low, median, high = statistics.quantiles(rounds, n=4, method="inclusive")
        return Spread(median, (high - low) / median)

    def moved(self, later: Spread) -> int:
        """1 if `later` is larger beyond the noise of both, -1 if it is smaller, else 0."""
        beyond, growth = 1 + self.with_noise_of(later), later.median / self.median
        return (growth > beyond) - (growth < 1 / beyond)

    def with_noise_of(self, later: Spread) -> float:
        return max(LEAST_NOISE, self.noise + later.noise)


class Change(NamedTuple):
    """A difference in one row; a regression if the row is ours and worse beyond the noise."""

    case: str
    row: str
    text: str
    regression: bool


def multiple(case: Mapping[str, Any], row: str) -> Spread | None:
    """A row's time as a multiple of the ceiling's; None if one of them has no figures.

    It is taken round by round, or relative to the ceiling's median if the numbers of rounds differ.
    """
    seconds = case["rows"][row]["seconds"]
    ceiling = case["rows"][case["ceilings"][0]]["seconds"] if case["ceilings"] else []
    if not seconds or not ceiling:
        return None
    if len(seconds) != len(ceiling):
        ceiling = [statistics.median(ceiling)] * len(seconds)
    return Spread.of([a / b for a, b in zip(seconds, ceiling)])


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[list[Change], list[str]]:
    """The rows that changed beyond the noise, and notes about what does not compare or is too noisy."""
    older, newer = ({case["name"]: case for case in results["cases"]} for results in (before, after))
    found: list[Change] = []
    was, now = before["machine_info"], after["machine_info"]
    notes = [
        f"{key}: {was.get(key)} before, {now.get(key)} after; times do not compare"
        for key in (SAME if was.get("gpu") == now.get("gpu") == "none" else SAME_GPU)
        if was.get(key) != now.get(key)
    ]
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
            row_changes, row_notes = _row(older[name], newer[name], row)
            found += row_changes
            notes += row_notes
    return sorted(found), sorted(notes)


def _row(older: Mapping[str, Any], newer: Mapping[str, Any], row: str) -> tuple[list[Change], list[str]]:
    case, ours = older["name"], is_ours(row)
    a, b = older["rows"][row], newer["rows"][row]
    if bool(a["refused"]) != bool(b["refused"]):
        gone = bool(b["refused"])
        text = f"measured before, now {b['refused']}" if gone else f"measured now, before {a['refused']}"
        return [Change(case, row, text, ours and gone)], []
    found, notes = _times(older, newer, row)
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


def _times(older: Mapping[str, Any], newer: Mapping[str, Any], row: str) -> tuple[list[Change], list[str]]:
    """What changed of a row's time: as a multiple of the ceiling and as it is, or the latter alone."""
    case, ours = older["name"], is_ours(row)
    a, b = older["rows"][row]["seconds"], newer["rows"][row]["seconds"]
    if not a or not b:
        return [], []
    seconds, later = Spread.of(a), Spread.of(b)
    milliseconds = f"{seconds.median * 1e3:.3g} -> {later.median * 1e3:.3g} ms"
    multiples = multiple(older, row), multiple(newer, row)
    was, now = multiples if None not in multiples else (seconds, later)
    assert was is not None and now is not None
    noise, moved = was.with_noise_of(now), was.moved(now)
    if None in multiples:
        text = f"{milliseconds} (noise {noise:.0%})"
    elif row == older["ceilings"][0]:
        return [], []
    else:
        text = f"{was.median:.3g} -> {now.median:.3g} times {older['ceilings'][0]} (noise {noise:.0%})"
    if moved and seconds.moved(later) == moved:
        return [Change(case, row, f"{'slower' if moved > 0 else 'faster'}: {text}", ours and moved > 0)], []
    if moved:
        return [], [f"{case}, {row}: {text}, but {milliseconds}: the ceiling moved"]
    if noise > LEAST_NOISE:
        return [], [f"{case}, {row}: too noisy to tell 10 %: {text}"]
    return [], []


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
