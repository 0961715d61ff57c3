"""A part of a GPU check: a process with a time limit, of which a record remains whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
MOST_OUTPUT = 4000  # characters kept of the end of a part's output
TO_FINISH = 15  # seconds for an interrupted part to write its files
LIMIT = "LIMIT"  # a word of a command that stands for the part's seconds, less TO_FINISH


class Part(NamedTuple):
    """A process and its limit in seconds.

    report: a JSON file that it writes, for its record. leaves: seconds of a call that it leaves to later
    parts.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    report: Path | None = None
    leaves: float = 0.0

    def within(self, seconds: float) -> Part:
        """A copy whose limit is at most what is left of a call, less `leaves`."""
        limit = max(min(self.limit, seconds - self.leaves), 1.0)
        words = (f"{max(limit - TO_FINISH, 1.0):.0f}" if word == LIMIT else word for word in self.command)
        return self._replace(limit=limit, command=tuple(words))


def run(part: Part, environment: Mapping[str, str], whole: Path | None = None) -> dict[str, Any]:
    """Run a part; its record. status: "ok", "failed", "over its limit" or "not found".

    whole: a file to which the part's whole output is appended.
    """
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        try:
            child = subprocess.Popen(
                part.command,
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_heed_interrupts,
            )
        except FileNotFoundError:
            status = "not found"
        else:
            try:
                status = "ok" if child.wait(part.limit) == 0 else "failed"
            except subprocess.TimeoutExpired:
                status = "over its limit"
                _end(child)
        log.seek(0)
        text = _without_paths(log.read())
    if whole:
        with whole.open("a") as file:
            file.write(f"==== {part.name}: {status}\n{text}\n")
    record = {
        "name": part.name,
        "status": status,
        "seconds": round(time.monotonic() - begin, 1),
        "limit": part.limit,
        "output": text[-MOST_OUTPUT:],
    }
    if part.report and part.report.exists():
        record["report"] = json.loads(part.report.read_text())
    return record


def _without_paths(text: str) -> str:
    """The text with the checkout's files named from its root, and the packages' from theirs."""
    for folder in (sysconfig.get_path("purelib"), sys.prefix, ROOT):  # a .venv lies in the checkout
        text = text.replace(f"{folder}/", "")
    return text


def _heed_interrupts() -> None:
    """Restore SIGINT, which a shell ignores in background jobs, so that `_end` can interrupt the part."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Interrupt the part, so that pytest writes its results, then kill its session with all workers."""
    child.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(TO_FINISH)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
