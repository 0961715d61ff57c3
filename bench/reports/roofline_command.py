"""`python -m bench roofline [RESULTS.json]` and `python -m bench roofline --mesh`: predictions, printed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from . import mesh, roofline


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench roofline",
        description=roofline.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", type=Path, nargs="?")
    parser.add_argument("--mesh", action="store_true", help="a step on 8, 64 and 1,024 H100s, by device mesh")
    parser.add_argument("--tokens", type=int, help="with --mesh: tokens of a GPU and a step (default: 8192)")
    given = parser.parse_args(argv)
    if given.tokens is not None and not given.mesh:
        parser.error(f"tokens: got {given.tokens} without --mesh, expected both")
    if not given.mesh:
        print(roofline.table(json.loads(given.results.read_text()) if given.results else None))
        return
    if given.results:
        parser.error(f"results: got {given.results} with --mesh, expected one of them")
    print(mesh.table(mesh.TOKENS if given.tokens is None else given.tokens))
