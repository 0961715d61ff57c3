"""Texts of a chat template, rendered in a process that may fail without harm (worker.py)."""

import atexit
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import Pipe
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from ..errors import FatalDataError
from . import worker
from .messages import Message

SECONDS = 3.0  # of processor time for all texts of a row; one takes about 0.1 ms


class Call(NamedTuple):
    """One text to make."""

    messages: Sequence[Message]
    tools: Sequence[Any] | None = None
    marks: bool = False
    """Whether to return the spans that {% generation %} marks."""
    prompt: bool = False
    """Whether to end with the generation prompt."""


class Rendered(NamedTuple):
    """The text and its marked spans, or why there is none."""

    text: str = ""
    spans: list[tuple[int, int]] = []
    error: str | None = None


class _Worker:
    """The process, and the pipe to it."""

    def __init__(self) -> None:
        self.owner = os.getpid()  # a forked process must not read its parent's replies
        self.pipe, theirs = Pipe()
        # -P: modules of fastalign must not hide others that are called data or nn. transformers is found as
        # it is here.
        command = [sys.executable, "-P", str(Path(worker.__file__)), str(theirs.fileno())]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment
        )
        theirs.close()

    def ask(self, request: Any) -> list[Any]:
        self.pipe.send(request)
        replies: list[Any] = json.loads(self.pipe.recv_bytes())
        return replies


_lock = Lock()
_worker: _Worker | None = None


def render(source: str, variables: Mapping[str, Any], calls: Sequence[Call]) -> list[Rendered]:
    """What the template `source` makes of each call, with its `variables`.

    All calls share SECONDS of processor time.

    Raises FatalDataError if the template takes longer or ends its process: later rows would wait as long.
    """
    request = (source, dict(variables), [call._asdict() for call in calls], SECONDS)
    with _lock:
        worker = _running()
        try:
            replies = worker.ask(request)
        except (EOFError, OSError) as error:
            status = _end()
            if status == -signal.SIGPROF:
                raise FatalDataError(
                    f"got no text in {SECONDS:g} s of processor time, expected one"
                ) from error
            raise FatalDataError(
                f"got the end of the process that renders it (status {status}), expected a text"
            ) from error
        except RecursionError as error:
            _end()
            raise FatalDataError("got messages that are nested too deeply, expected flatter ones") from error
        except BaseException:
            _end()  # its pending answer would be taken for the next one
            raise
    return [
        Rendered(error=reply[0]) if len(reply) == 1 else Rendered(reply[0], [(a, b) for a, b in reply[1]])
        for reply in replies
    ]


def _running() -> _Worker:
    global _worker
    if _worker is None or _worker.owner != os.getpid():
        _worker = _Worker()
    return _worker


@atexit.register
def _end() -> int:
    global _worker
    worker, _worker = _worker, None
    if worker is None:
        return 0
    worker.pipe.close()
    if worker.owner != os.getpid():
        return 0
    try:
        return worker.process.wait(timeout=1)  # the status, if it died
    except subprocess.TimeoutExpired:
        worker.process.kill()
        return worker.process.wait()
