"""All tests of the head with a sharded vocabulary (tests/linear/test_sharded.py), on 1, 2 and 4 ranks.

    python -m tests.hammer.sharded_head             1, 2 and 4 ranks, half a minute each
    python -m tests.hammer.sharded_head --ranks 4

A CPU with two cores serves four ranks, which then wait for each other.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from tests.linear import sharded_checks, sharded_ranks
from tests.linear.sharded_cases import CASES
from tests.two_ranks import run_as_ranks


def check(ranks: int) -> None:
    """Raise AssertionError where the ranks' results are not those of one process."""
    with tempfile.TemporaryDirectory() as folder:
        run_as_ranks(sharded_ranks.__file__, Path(folder), ranks)
        found = [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(ranks)]
    for layout, rows in sharded_ranks.LAYOUTS[ranks].items():
        for name in CASES:
            sharded_checks.check_case(found, name, layout)
        sharded_checks.check_tails(found, layout)
        print(f"{ranks} ranks, rows {list(rows)}: {len(CASES)} cases and the tail are right", flush=True)
    sharded_checks.check_dtensors(found)
    sharded_checks.check_nothing(found)
    if ranks > 1:
        for name in CASES:
            sharded_checks.check_collectives(found, name)
        print(f"{ranks} ranks: the collectives of {len(CASES)} cases are those of the docstring", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", type=int, choices=sorted(sharded_ranks.LAYOUTS), nargs="*")
    for ranks in parser.parse_args().ranks or sharded_ranks.LAYOUTS:
        check(ranks)


if __name__ == "__main__":
    main()
