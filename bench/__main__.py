"""`python -m bench`: run the suite and write bench/results/<machine>-<date>.json, a report and plots.

Arguments that are not listed go to pytest: `python -m bench -k token_stats`, `python -m bench --shape
512,576,49152`. `python -m bench roofline` predicts instead of measuring (reports/roofline.py).
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from fastalign.measure import available_cores, machine

from .reports import roofline_command
from .reports.markdown import render
from .reports.plots import draw

HERE = Path(__file__).parent


def main(argv: list[str] | None = None) -> int:
    """Run the suite; the exit status is not 0 if a row of ours is wrong. A missed target is only printed."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["roofline"]:
        roofline_command.main(argv[1:])
        return 0
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Time, peak memory and error of fastalign and its peers.",
        epilog=__doc__,
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=available_cores(),
        help="threads of torch (default: the available cores, whatever OMP_NUM_THREADS says)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="results file (default: bench/results/<machine>-<date>.json, overwritten on the same day)",
    )
    given, rest = parser.parse_known_args(argv)
    torch.set_num_threads(given.threads)
    output = given.output or HERE / "results" / f"{slug()}-{datetime.date.today().isoformat()}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    # timeout=0: a case takes longer than the limit of a test in pyproject.toml. The warnings come from peers.
    options = [
        "-o",
        "python_files=bench_*.py",
        "-o",
        "python_functions=bench_*",
        "-o",
        "timeout=0",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
    ]
    table = [
        "--benchmark-columns=median,min,max,rounds",
        "--benchmark-sort=mean",
        "-q",
        "-rs",
        f"--benchmark-json={output}",
    ]
    status = int(pytest.main([str(HERE / "cases"), *options, *table, *rest]))
    if output.exists() and output.stat().st_size:
        results = json.loads(output.read_text())
        report = output.with_suffix(".md")
        report.write_text(render(results))
        print("\n" + report.read_text(), end="")
        plots = (
            draw(results, output)
            if importlib.util.find_spec("matplotlib")
            else ["no plots: matplotlib is not installed"]
        )
        print(f"\nresults: {output}", report, *plots, sep="\n")
    return status


def slug() -> str:
    """The machine's name for a file name: GPU or processor, and how many threads."""
    info = machine()
    name = info["gpu"] if info["gpu"] != "none" else f"{info['cpu']} {info['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
