"""Times of every operation on this GPU, each beside its ceiling and its peers: `python -m bench.gpu.times`.

Sections run in the order of SECTIONS, and each may take an equal share of the time that is left. What
compiles comes last. A case that fails, or for which no time is left, is written down, and the next begins.
The exit status is 1 if one of our rows has no figures.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from .case import GpuCase
from .results import Results
from .rounds import MeasuredCase, Rounds, as_json, left_out, line, measure

# Modules of this package with CASES: Sequence[GpuCase], the most important first.
SECTIONS = {
    "heads": "head_cases",
    "logits": "logits_cases",
    "sampling": "sampling_cases",
}
OUT_OF_TIME = "not run: out of time"


def cases_of(section: str) -> list[GpuCase]:
    """The cases of a section. Its module is imported here, after the dry run has chosen the interpreter."""
    return list(importlib.import_module(f".{SECTIONS[section]}", __package__).CASES)


def sections(pattern: str) -> dict[str, list[GpuCase]]:
    """The cases by section whose name, or whose section's name, contains the pattern."""
    found = {
        section: [case for case in cases_of(section) if pattern in case.name or pattern in section]
        for section in SECTIONS
    }
    return {section: cases for section, cases in found.items() if cases}


def timed(
    parts: dict[str, list[GpuCase]], device: str, rounds: Rounds, seconds: float
) -> Iterator[MeasuredCase]:
    """Each case, measured or left out, then those with compiled peers once more."""
    end = time.monotonic() + seconds
    phases = [(cases, False) for cases in parts.values()]
    phases.append(([case for cases in parts.values() for case in cases if case.compiles], True))
    for number, (cases, compiled) in enumerate(phases):
        now = time.monotonic()
        deadline = now + (end - now) / (len(phases) - number)
        for case in cases:
            if time.monotonic() < deadline:
                yield measure(case, device, rounds, compiled=compiled)
            else:
                yield left_out(f"{case.name}, compiled" if compiled else case.name, case, OUT_OF_TIME)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.times",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, help="results file; without it, times are only printed")
    parser.add_argument("--seconds", type=float, default=200.0, help="begin no case after that")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases or sections whose name has TEXT")
    parser.add_argument("--list", action="store_true", help="print the cases and run nothing")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU, one round each")
    given = parser.parse_args(argv)
    device, rounds = "cuda", Rounds()
    if given.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported
        device, rounds = "cpu", Rounds(0.0, 1, 1)
    elif not given.list and not torch.cuda.is_available():
        parser.error("device: got no GPU, expected one; --dry-run takes a CPU")
    parts = sections(given.only)
    if given.list:
        for section, cases in parts.items():
            print(*(f"{section}: {case.name}; {tuple(case.shape)}" for case in cases), sep="\n")
        return 0
    results = Results(given.output) if given.output else None
    failed = 0
    for measured in timed(parts, device, rounds, given.seconds):
        failed += bool(measured.failed)
        print(line(measured), flush=True)
        if results:
            results.add("cases", as_json(measured))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
