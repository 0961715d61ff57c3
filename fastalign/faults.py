"""How a command ends when it cannot continue.

A fault of data, model, environment or configuration prints one line on stderr, from rank 0, and exits with
status 2. FASTALIGN_TRACEBACK=1 shows the traceback. Any other exception is a bug: it keeps its traceback
and exit status 1. A signal ends the command with one line and status 128 + its number.
"""

import argparse
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

FAULT = 2
# A bare TypeError, KeyError, AttributeError, IndexError, AssertionError or RuntimeError is a bug.
_FAULTS = (ValueError, OSError, FloatingPointError, ImportError, MemoryError, EOFError)
# Errors of other packages (torch, safetensors, huggingface_hub, datasets, jinja2, pickle), by name: their
# modules change with their versions, and importing them only to compare types would take seconds.
_FOREIGN = {
    "OutOfMemoryError",
    "SafetensorError",
    "StrictDataclassError",
    "DatasetsError",
    "TemplateError",
    "UnpicklingError",
}
_EXTRAS = {"torch": "torch", "vaderSentiment": "fastalign[demo]", "matplotlib": "fastalign[demo]"}
# Texts of RuntimeErrors of torch that are no bug: memory, a damaged file, weights of another model.
_TEXTS = (
    "can't allocate memory",
    "out of memory",
    "PytorchStreamReader failed",
    "PytorchStreamWriter failed",
    "in loading state_dict",
)


class RankError(RuntimeError):
    """What happened on another rank, for this rank to report."""


class Stopped(KeyboardInterrupt):
    """A signal ended the run. The message says what was saved and how to go on."""

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message)
        self.number = number
        self.message = message


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that prints one line, from rank 0, when it refuses."""

    def error(self, message: str) -> NoReturn:
        """Print the line and exit with status 2."""
        say(self.prog, f"error: {' '.join(message.split())}")
        sys.exit(FAULT)


def describe(error: BaseException) -> str | None:
    """The line that reports a fault; None for a bug."""
    if not _is_fault(error):
        return None
    message = "; ".join(" ".join(line.split()) for line in re.split(r"\n(?=\S)", str(error)))
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.split(".")[0]
        extra = _EXTRAS.get(package, "fastalign[train]")
        return f"needs {package}, which is not installed: pip install '{extra}'"
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "allocate memory" in message
    ):
        return (
            f"out of memory: {message or 'no more can be had'}; a smaller micro_batch_size or "
            "gradient_checkpointing=true may do"
        )
    if isinstance(error, RankError) or _raised_here(error):
        return message
    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
    return f"{type(error).__name__}: {message}{notes} (FASTALIGN_TRACEBACK=1 shows where)"


def say(prog: str, message: str) -> None:
    """Print a line on stderr, on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{prog}: {message}", file=sys.stderr, flush=True)


@contextmanager
def reporting(prog: str) -> Iterator[None]:
    """End the process as the module docstring says if the body raises a fault or a signal comes."""
    before = signal.signal(signal.SIGTERM, _stop)
    format_before = warnings.formatwarning
    warnings.formatwarning = _one_line_warnings(prog, format_before)
    from .versions import noting_newer_packages  # here: --help needs none of it

    try:
        with noting_newer_packages():
            yield
    except KeyboardInterrupt as stop:
        # torchrun sends SIGTERM because another rank has ended. It must not cut the line off.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        message = stop.message if isinstance(stop, Stopped) else ""
        where = message or " before the first step; nothing was trained"
        say(prog, f"stopped by {signal.Signals(number).name}{where}")
        _exit(128 + number)
    except Exception as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        line = describe(error)
        if line is None:
            raise
        if os.environ.get("FASTALIGN_TRACEBACK", "0") not in ("", "0"):
            traceback.print_exc()
        elif isinstance(error, RankError):  # of the lowest rank that is left
            print(f"{prog}: error: {line}", file=sys.stderr, flush=True)
        else:
            say(prog, f"error: {line}")
        _exit(FAULT)
    finally:
        signal.signal(signal.SIGTERM, before)
        warnings.formatwarning = format_before


def _one_line_warnings(prog: str, otherwise: Callable[..., str]) -> Callable[..., str]:
    """A `warnings.formatwarning` that prints fastalign's warnings without a line of its source."""
    here = os.path.dirname(os.path.abspath(__file__))

    def formatted(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if category is UserWarning and os.path.abspath(filename).startswith(here + os.sep):
            return f"{prog}: warning: {' '.join(str(message).split())}\n"
        return otherwise(message, category, filename, lineno, line)

    return formatted


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)


def _exit(status: int) -> NoReturn:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Skip the end of the interpreter, in which the process group may wait for a rank that is gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _is_fault(error: BaseException) -> bool:
    if isinstance(error, ModuleNotFoundError):
        return not (error.name or "").startswith("fastalign")
    if isinstance(error, (*_FAULTS, RankError)):
        return True
    if type(error) is Exception:  # what `tokenizers` raises for a file that it cannot read
        return True
    if any(kind.__name__ in _FOREIGN for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS)


def _raised_here(error: BaseException) -> bool:
    """Whether a `raise` in fastalign raised it, so that the message says all."""
    last = next(iter(traceback.extract_tb(error.__traceback__)[-1:]), None)
    frames = list(traceback.walk_tb(error.__traceback__))
    if last is None:
        return True
    module = frames[-1][0].f_globals.get("__name__") or ""
    return module.startswith(("fastalign", "__main__")) and (last.line or "").startswith("raise ")
