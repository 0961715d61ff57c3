"""`make gpu-check`: builds, tests and measures on a bare GPU machine without network, in two short calls.

    python3 -m bench.gpu.check --part tests --wheels wheels   # from the root, by the python that has torch
    python3 -m bench.gpu.check --part times                   # each at most five minutes; without --part both
    python3 -m bench.gpu.check --plan                         # the parts and their limits

Each part is a process with a time limit. A part that fails, is not found or runs over is recorded, and the
next one begins. Both calls write the same results file, which bench.reports reads: its `checks` have a record
for each part, and its `cases` a row for each time. bench/README.md says how to fill the folder of wheels.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import parts as plan
from .parts import SECONDS, TESTS, TIMES
from .process import ROOT, TO_FINISH, Part, run
from .results import Results

RESULTS = ROOT / "bench" / "results" / "gpu"


def check(
    stages: Sequence[Sequence[Part]],
    results: Results,
    site: Path,
    seconds: float = SECONDS,
    log: Path | None = None,
) -> int:
    """Run the stages and record each part in the results; how many parts were not ok."""
    end = time.monotonic() + seconds
    path = os.pathsep.join(
        filter(None, [str(ROOT), str(ROOT / "kernels"), str(site), os.environ.get("PYTHONPATH")])
    )
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    records: list[dict[str, Any]] = []
    for stage in stages:
        left = end - time.monotonic() - TO_FINISH
        limited = [part.within(left) for part in stage]
        with ThreadPoolExecutor(len(stage)) as pool:
            for record in pool.map(lambda part: run(part, environment, log), limited):
                records.append(record)
                results.add("checks", record)
                _show(record)
    print(f"results: {results.path}")
    return sum(record["status"] != "ok" for record in records)


def _show(record: dict[str, Any]) -> None:
    print(f"{record['status']:14} {record['seconds']:6.1f} s  {record['name']}", flush=True)
    if record["status"] != "ok":
        print(record["output"][-2000:], flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", choices=(TESTS, TIMES), help="one call of the two (default: both)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of a call (default: {SECONDS})")
    parser.add_argument(
        "--wheels", type=Path, default=ROOT / "wheels", help="folder of the peers' wheels (default: wheels)"
    )
    parser.add_argument(
        "--output", type=Path, help="results file (default: bench/results/gpu/check-<date>.json)"
    )
    parser.add_argument("--log", type=Path, help="append the whole output of each part to this file")
    parser.add_argument(
        "--plan", action="store_true", help="print the parts with their limits and run nothing"
    )
    given = parser.parse_args(argv)
    output = given.output or RESULTS / f"check-{datetime.date.today().isoformat()}.json"
    output = output.absolute()
    wheels = sorted(given.wheels.glob("*.whl"))
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder, "site")
        for part in (given.part,) if given.part else (TESTS, TIMES):
            rest = (
                plan.tests(given.seconds, Path(folder))
                if part == TESTS
                else plan.times(given.seconds, output)
            )
            stages = [*plan.prepared(wheels, site), *rest]
            if given.plan:
                for stage in stages:
                    print(*(f"{p.limit:4.0f} s  {p.name}: {' '.join(p.command)}" for p in stage), sep="\n")
                continue
            bad += check(stages, Results(output), site, given.seconds, given.log)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
