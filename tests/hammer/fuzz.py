"""Fuzzes the public functions against their specifications, readers with damaged files, draws and screens.

    make fuzz                       two minutes of each, with a seed that is printed
    make fuzz FUZZ_SECONDS=3600
    python -m tests.hammer.fuzz --only readers --case 81234567      one case again

A case is a function of its number, which a finding names. Each area runs in a fork: a crash, or a case of
more than a minute, is a finding too, and the next case follows.
"""

import argparse
import mmap
import os
import pickle
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.hammer import functions, readers, sampling, screen

AREAS: dict[str, Callable[[random.Random], str]] = {
    "functions": functions.fuzz,
    "sample": sampling.fuzz,
    "screen": screen.fuzz,
    "readers": readers.fuzz,
}
LONGEST = 60  # seconds of a case


class Found(Exception):
    """A finding of one case."""


def attempt(area: str, case: int) -> str:
    """The kind of the case, whose number is its seed. Raises Found."""
    try:
        return AREAS[area](random.Random(case))
    except Exception as error:
        raise Found("".join(traceback.format_exception(error))) from None


def work(area: str, first: int, until: float, cases: int, current: mmap.mmap, results: Path) -> None:
    """Cases from `first` on, until a time or a number of them; after each, the place is noted."""
    kinds: Counter[str] = Counter()
    found: dict[int, str] = {}
    case = first
    while time.time() < until and case - first < cases:
        current[:8] = case.to_bytes(8, "little")
        signal.alarm(LONGEST)
        try:
            kinds[attempt(area, case)] += 1
        except Found as error:
            found[case] = str(error)
        case += 1
        if time.time() >= until or case - first >= cases or case % 50 == 0 or found:
            results.write_bytes(pickle.dumps((kinds, found, case - first)))
    signal.alarm(0)


def run(area: str, seed: int, seconds: float, cases: int) -> tuple[Counter[str], dict[int, str]]:
    """Fuzz one area; the kinds of cases, and the findings by number."""
    kinds: Counter[str] = Counter()
    found: dict[int, str] = {}
    first, until = seed, time.time() + seconds
    current = mmap.mmap(-1, 8)
    with tempfile.TemporaryDirectory(prefix="fastalign-fuzz-") as folder:
        results = Path(folder, "results")
        while time.time() < until and first - seed < cases:
            results.write_bytes(pickle.dumps((Counter(), {}, 0)))
            sys.stdout.flush()
            child = os.fork()
            if child == 0:
                try:
                    work(area, first, until, cases - (first - seed), current, results)
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
            _, status = os.waitpid(child, 0)
            new, wrong, _ = pickle.loads(results.read_bytes())
            kinds += new
            found |= wrong
            first = int.from_bytes(current[:8], "little") + 1
            if status:
                code = os.waitstatus_to_exitcode(status)
                why = (
                    f"more than {LONGEST} s"
                    if code == -signal.SIGALRM
                    else f"the process ended with status {code}"
                )
                found[first - 1] = why
    return kinds, found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--seed", type=int, default=None, help="number of the first case; default: drawn, and printed"
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="for each area")
    parser.add_argument("--cases", type=int, default=2**62, help="at most so many in each area")
    parser.add_argument("--only", choices=AREAS, action="append", help="an area; may be repeated")
    parser.add_argument("--case", type=int, help="run one case of the area given by --only, in this process")
    arguments = parser.parse_args()
    if arguments.case is not None:
        (area,) = arguments.only or ["functions"]
        print(AREAS[area](random.Random(arguments.case)))
        return 0
    seed = random.randrange(2**40) if arguments.seed is None else arguments.seed
    total = 0
    for area in arguments.only or AREAS:
        kinds, found = run(area, seed, arguments.seconds, arguments.cases)
        for case, what in found.items():
            print(f"FOUND {area}, --only {area} --case {case}: {what}", flush=True)
        print(
            f"fuzz: {area}: {kinds.total() + len(found)} cases, {len(found)} findings (--seed {seed})",
            flush=True,
        )
        print("  " + "; ".join(f"{kind} {count}" for kind, count in kinds.most_common()))
        total += len(found)
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
