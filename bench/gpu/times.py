"""Times of every operation on this GPU, each beside its ceiling and its peers: `python -m bench.gpu.times`.

Sections run in the order of SECTIONS, and each may take its share of the time that is left. What compiles
comes last. A case that fails, that ends its process, or for which no time is left is written down,
and the next begins. The exit status is 1 if one of our rows has no figures.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from .case import GpuCase
from .results import Results
from .rounds import MeasuredCase, Rounds, as_json, left_out, line, measure


class Section(NamedTuple):
    """A module of this package with CASES: Sequence[GpuCase], and its share of the time."""

    module: str
    share: float


SECTIONS = {
    "heads": Section("head_cases", 10),
    "logits": Section("logits_cases", 3),
    "sampling": Section("sampling_cases", 3),
    "tail": Section("tail_cases", 4),
    "rollouts": Section("rollout_cases", 5),
    "engines": Section("engine_cases", 4),
}
COMPILED = "compiled"
COMPILED_SHARE = 4
OUT_OF_TIME = "not run: out of time"
DIED = "failed: the process ended in this case"
BROKEN = 3  # exit status: after an error the device serves no other case of this process


def cases_of(section: str) -> list[GpuCase]:
    """The cases of a section."""
    return list(importlib.import_module(f".{SECTIONS[section].module}", __package__).CASES)


def sections(pattern: str) -> dict[str, list[GpuCase]]:
    """The cases by section whose name, or whose section's name, contains the pattern."""
    found = {
        section: [case for case in cases_of(section) if pattern in case.name or pattern in section]
        for section in SECTIONS
    }
    return {section: cases for section, cases in found.items() if cases}


def queued(case: GpuCase) -> GpuCase:
    """The case without the host's launches in its times."""
    return case if case.queued else case._replace(name=f"{case.name}, queued", queued=True)


class Begun:
    """The names of the cases that were begun, in a file that outlives the process. The last may have died."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.earlier = path.read_text().splitlines() if path and path.exists() else []

    def add(self, name: str) -> None:
        if self.path:
            with self.path.open("a") as file:
                file.write(f"{name}\n")


def timed(
    parts: dict[str, list[GpuCase]], device: str, rounds: Rounds, seconds: float, begun: Begun | None = None
) -> Iterator[MeasuredCase]:
    """Each case, measured or left out, then those with compiled peers once more.

    begun: the cases that an earlier process began are left out, but for the one in which it died.
    """
    begun = begun or Begun(None)
    end = time.monotonic() + seconds
    # Backwards, since the rollouts' compiled row is ours and the heads' are peers'.
    compiling = [case for cases in reversed(parts.values()) for case in cases if case.compiles]
    phases = dict(parts) | {COMPILED: compiling}
    shares = {name: SECTIONS[name].share if name in SECTIONS else COMPILED_SHARE for name in phases}
    for phase, cases in phases.items():
        now, compiled = time.monotonic(), phase == COMPILED
        deadline = now + (end - now) * shares[phase] / sum(shares.values())
        del shares[phase]
        for case in cases:
            name = f"{case.name}, compiled" if compiled else case.name
            if name in begun.earlier:
                if name == begun.earlier[-1]:
                    yield left_out(name, case, DIED)
            elif time.monotonic() < deadline:
                begun.add(name)
                yield measure(case, device, rounds, compiled=compiled)
            else:
                yield left_out(name, case, OUT_OF_TIME)


def measure_all(given: argparse.Namespace) -> int:
    """Measure the cases in this process; the exit status."""
    device, rounds = ("cpu", Rounds(0.0, 1)) if given.dry_run else ("cuda", Rounds())
    results = Results(given.output) if given.output else None
    failed = 0
    parts = sections(given.only)
    if given.queued:
        parts = {section: [queued(case) for case in cases] for section, cases in parts.items()}
    for measured in timed(parts, device, rounds, given.seconds, Begun(given.begun)):
        failed += bool(measured.failed)
        print(line(measured), flush=True)
        if results:
            results.add("cases", as_json(measured))
        if device == "cuda" and _broken():
            return BROKEN
    return 1 if failed else 0


def _broken() -> bool:
    """Whether an earlier error, such as an illegal access, has ended this process's use of the device."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"the device does not answer: {error}", flush=True)
        return True
    return False


def supervise(arguments: Collection[str], seconds: float) -> int:
    """Run `measure_all` in a process of its own, and in another one after the case in which one died."""
    end, died = time.monotonic() + seconds, False
    with tempfile.TemporaryDirectory() as folder:
        begun = ("--begun", str(Path(folder, "begun")))
        while True:
            left = ("--seconds", f"{max(end - time.monotonic(), 0):.0f}")
            command = (sys.executable, "-m", "bench.gpu.times", *arguments, *left, *begun)
            status = subprocess.run(command).returncode
            if status in (0, 1):
                return 1 if died else status
            died = True
            print(f"the process ended with status {status}; the next case begins in another", flush=True)
            if time.monotonic() > end:
                return 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.times",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, help="results file; without it, times are only printed")
    parser.add_argument("--seconds", type=float, default=200.0, help="begin no case after that")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases or sections whose name has TEXT")
    parser.add_argument(
        "--queued", action="store_true", help="time the device alone, behind 3 ms of other work"
    )
    parser.add_argument("--list", action="store_true", help="print the cases and run nothing")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU, one round each")
    parser.add_argument("--begun", type=Path, help=argparse.SUPPRESS)  # of a process that `supervise` began
    given = parser.parse_args(argv)
    arguments = sys.argv[1:] if argv is None else argv
    if given.dry_run and os.environ.get("TRITON_INTERPRET") != "1":  # it counts when a kernel is imported
        command = (sys.executable, "-m", "bench.gpu.times", *arguments)
        return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode
    if not given.dry_run and not given.list and not torch.cuda.is_available():
        parser.error("device: got no GPU, expected one; --dry-run takes a CPU")
    if given.list:
        for section, cases in sections(given.only).items():
            print(*(f"{section}: {case.name}; {tuple(case.shape)}" for case in cases), sep="\n")
        return 0
    if given.dry_run or given.begun:
        return measure_all(given)
    return supervise(arguments, given.seconds)


if __name__ == "__main__":
    sys.exit(main())
