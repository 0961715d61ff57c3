"""Progress bars, and the seconds that each part of the demo takes."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from ..stages.runs.reporters import PROGRESS_SECONDS


def bar(*arguments: Any, **options: Any) -> tqdm:
    """A progress bar, which writes seldom if stderr is a file."""
    return tqdm(*arguments, mininterval=0.2 if sys.stderr.isatty() else PROGRESS_SECONDS, **options)


@contextmanager
def part(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Announce a part of the run, and note its seconds."""
    print(f"== {name}", flush=True)
    began = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - began
