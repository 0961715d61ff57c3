"""How a command ends: which errors are faults and make one line, which are bugs and keep their traceback."""

import errno
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from fastalign import faults
from fastalign.data import DataError


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return caught


@pytest.fixture
def in_fastalign(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this file raises counts as raised by fastalign."""
    monkeypatch.setitem(globals(), "__name__", "fastalign.somewhere")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (DataError("rows.jsonl: no rows"), "rows.jsonl: no rows"),
        (FloatingPointError("step 3: loss = nan"), "step 3: loss = nan"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/metrics.jsonl"),
            "[Errno 28] No space left on device: 'out/metrics.jsonl'",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "[Errno 13] Permission denied: '/x'"),
        (ValueError("two\n  lines"), "two lines"),
        (ValueError("a.jsonl, row 1: x\nb.jsonl, row 2: y"), "a.jsonl, row 1: x; b.jsonl, row 2: y"),
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            "out of memory: CUDA out of memory.; a smaller micro_batch_size",
        ),
        (
            RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: you tried"),
            "out of memory: [enforce]",
        ),
        (MemoryError(), "out of memory: no more can be had"),
        (
            ModuleNotFoundError("No module named 'pydantic'", name="pydantic"),
            "needs pydantic, which is not installed: pip install 'fastalign",
        ),
    ],
)
def test_a_fault_is_one_line(error: Exception, line: str, in_fastalign: None) -> None:
    shown = faults.describe(raised(error))
    assert shown is not None and line in shown and "\n" not in shown


@pytest.mark.parametrize(
    "error",
    [
        TypeError("x"),
        KeyError("x"),
        AttributeError("x"),
        IndexError(1),
        AssertionError(),
        RuntimeError("shapes"),
        NotImplementedError(),
    ],
)
def test_a_bug_is_none(error: Exception) -> None:
    assert faults.describe(raised(error)) is None


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("header too large"),
        Exception("data did not match any variant"),  # as tokenizers raises it
        FileNotFoundError(errno.ENOENT, "No such file or directory", "x"),
    ],
)
def test_an_error_that_fastalign_did_not_raise_names_its_kind_and_the_way_to_its_traceback(
    error: Exception,
) -> None:
    assert (
        faults.describe(raised(error))
        == f"{type(error).__name__}: {error} (FASTALIGN_TRACEBACK=1 shows where)"
    )


def test_an_error_of_a_builtin_counts_as_foreign(in_fastalign: None) -> None:
    with pytest.raises(ValueError) as caught:
        int("seven")
    assert (faults.describe(caught.value) or "").endswith(" (FASTALIGN_TRACEBACK=1 shows where)")


def _show_as_python_does(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any
) -> None:
    """pytest collects warnings otherwise."""
    sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_rank_0_alone_tells(
    rank: str,
    lines: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    in_fastalign: None,
) -> None:
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as stop, faults.reporting("fastalign sft"):
        raise DataError("rows.jsonl: no rows")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "fastalign sft: error: rows.jsonl: no rows\n" * lines


def test_the_traceback_is_there_on_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTALIGN_TRACEBACK", "1")
    with pytest.raises(SystemExit) as stop, faults.reporting("fastalign sft"):
        raise DataError("rows.jsonl: no rows")
    shown = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and shown.startswith("Traceback")
        and shown.endswith("DataError: rows.jsonl: no rows\n")
    )


def test_a_warning_of_fastalign_is_one_line_and_others_stay_as_they_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = warnings.formatwarning
    with faults.reporting("fastalign sft"), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = _show_as_python_does  # type: ignore[assignment]
        warnings.warn_explicit("row 3: too long,\n left out", UserWarning, faults.__file__, 7)
        warnings.warn_explicit("of torch", UserWarning, torch.__file__, 7)
    assert warnings.formatwarning is before
    assert capsys.readouterr().err.splitlines()[:2] == [
        "fastalign sft: warning: row 3: too long, left out",
        f"{torch.__file__}:7: UserWarning: of torch",
    ]


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(TypeError), faults.reporting("fastalign sft"):
        raise TypeError("a bug")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_training_ends_at_once_with_one_line(
    number: int, status: int, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    # A shell starts its background jobs, and with them these tests, so that they ignore SIGINT.
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, interrupt))
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop, faults.reporting("fastalign sft"):
        signal.raise_signal(number)
    assert stop.value.code == status
    name = signal.Signals(number).name
    assert (
        capsys.readouterr().err
        == f"fastalign sft: stopped by {name} before the first step; nothing was trained\n"
    )
    assert signal.getsignal(signal.SIGTERM) is before


def sft(folder: Path, *arguments: str) -> tuple[int, str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "fastalign.stages.sft", *arguments]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stderr


def test_a_stage_run_as_a_module_tells_in_one_line_too(tmp_path: Path) -> None:
    assert sft(tmp_path, "model=foo", "train_data=x.jsonl", "output_dir=out", "lerning_rate=1") == (
        2,
        "fastalign sft: error: got the unknown key 'lerning_rate', expected learning_rate\n",
    )
