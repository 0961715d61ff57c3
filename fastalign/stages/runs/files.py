"""Files that are whole or absent, whatever ends the process or the machine.

A file or folder is written under another name (`….unfinished`), synced to the disk and renamed. Then its
parent folder is synced. Lists of the SHA-256 of files, in the format of `sha256sum --check`, show what a disk
or a copy changes later.
"""

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

MANIFEST = "manifest.sha256"


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        # Some network file systems have no fsync of a folder. They rename in order anyway.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(number)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Give a temporary name to the body. The file then takes the place of `path`."""
    unfinished = unfinished_name(path)
    try:
        yield unfinished
        sync(unfinished)
        os.replace(unfinished, path)
    except Exception:
        # Remove the rest: it would keep a full disk full. After a kill, the next run overwrites it.
        unfinished.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file as `new_file` does."""
    with new_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def unfinished_name(path: Path) -> Path:
    """The name of a file or folder while it is written."""
    return path.with_name(path.name + ".unfinished")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder to the body. It then takes the place of the folder `path`."""
    unfinished = unfinished_name(path)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for inside, _, names in os.walk(unfinished, topdown=False):
            for name in names:
                sync(Path(inside, name))
            sync(Path(inside))
    except Exception:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    replace_folder(unfinished, path)


def replace_folder(whole: Path, path: Path) -> None:
    """Rename the folder `whole` to `path`.

    An existing folder is deleted afterwards. Between two renames it has the name `….replaced`.
    """
    replaced = path.with_name(path.name + ".replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if path.exists():
        os.replace(path, replaced)
    os.replace(whole, path)
    sync(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def write_hashes(folder: Path, listed_in: Path, names: Sequence[str]) -> None:
    """Write the hashes of files of a folder, in the format of `sha256sum --check`, and sync the list.

    SHA-256 runs at 1.5 GB/s per core if the processor has instructions for it.
    """
    listed_in.write_bytes(b"".join(_line(folder / name) for name in names))
    sync(listed_in)


def list_hashes(listed_in: Path) -> dict[str, str] | None:
    """The hashes in such a list by the names of the files; None if the list is not whole."""
    lines = listed_in.read_bytes().split(b"\n")
    matches = [re.fullmatch(rb"([0-9a-f]{64})  ([\w.-]+)", line) for line in lines[:-1]]
    if lines[-1] or not all(matches):
        return None
    return {match[2].decode(): match[1].decode() for match in matches if match}


def find_change(folder: Path, listed_in: Path, hashes: Mapping[str, str]) -> str | None:
    """How the files of a folder differ from these hashes, which are those of a list; None if they do not."""
    if missing := [name for name in hashes if not (folder / name).exists()]:
        return f"{missing[0]}, which {listed_in.name} lists, is missing"
    changed = [
        name for name, value in hashes.items() if _line(folder / name) != f"{value}  {name}\n".encode()
    ]
    return f"{' and '.join(changed)} does not agree with {listed_in.name}" if changed else None


def _line(path: Path) -> bytes:
    with path.open("rb") as file:
        return f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n".encode()
