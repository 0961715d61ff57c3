"""The folder of a run: held by one run at a time, with room for what the run will write."""

import errno
import fcntl
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = "lock"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_TEXTS = (
    *("PytorchStreamWriter failed", "inline_container.cc"),  # of torch.save, which loses the errno
    *("No space left", "Disk quota exceeded", "File too large"),
)


@contextmanager
def held(field: str, folder: Path, *, name: str = LOCK, wait: bool = False) -> Iterator[None]:
    """Hold the lock `name` of `folder`, which is created if it is missing.

    If another run holds it, wait for that run or refuse.

    The kernel lets go of the lock when the process ends, however it ends, so one that is left behind blocks
    nobody. Where the file system has no locks, that is said and the run goes on. Raises ValueError with the
    process and the machine of the run that holds it, and for a folder that cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = (folder / name).open("a+")
    except OSError as error:
        raise ValueError(
            f"{field}: got {str(folder)!r} ({error.strerror}), expected a folder that can be written"
        ) from error
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"{field}: got {str(folder)!r}, which is in use by {file.read().strip() or 'another run'}, "
                "expected a folder that is not in use"
            ) from None
        except OSError as error:
            print(
                f"{field}: {folder} cannot be locked ({error.strerror}): let no other run use it",
                file=sys.stderr,
                flush=True,
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def check_room(folder: Path, needed: int, what: str) -> None:
    """Raise OSError if fewer than `needed` bytes are free in the existing `folder`."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"output_dir: got {_size(free)} free in {str(folder)!r}, expected {_size(needed)} for {what}"
        )


@contextmanager
def naming(folder: Path, needed: int, what: str) -> Iterator[None]:
    """Name `folder` and what is needed if the disk fills up while the body writes `needed` bytes."""
    try:
        yield
    except Exception as error:
        full = (
            error.errno in _FULL
            if isinstance(error, OSError)
            else any(text in str(error) for text in _FULL_TEXTS)
        )
        if not full:
            raise
        free = _size(shutil.disk_usage(folder).free)
        raise OSError(
            f"output_dir: got {free} free in {str(folder)!r}, expected {_size(needed)} for {what}: {error}"
        ) from error


def _size(number: int) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
