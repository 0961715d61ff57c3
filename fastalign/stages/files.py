"""Files that are whole or absent, whatever ends the process or the machine.

A file or folder is written under another name (`….unfinished`), synced to the disk and renamed. Then its
parent folder is synced. A sealed folder has a manifest of the SHA-256 of its files, in the format of
`sha256sum --check`.
"""

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
    unfinished = path.with_name(path.name + ".unfinished")
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


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder to the body. It then takes the place of the folder `path`."""
    unfinished = path.with_name(path.name + ".unfinished")
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


def seal(folder: Path) -> None:
    """Write the manifest of the folder's .pt files, and sync it and them."""
    paths = sorted(folder.glob("*.pt"))
    # The disk writes while the processor hashes. SHA-256 runs at 1.5 GB/s per core if the processor has
    # instructions for it.
    with ThreadPoolExecutor(1) as disk:
        synced = [disk.submit(sync, path) for path in paths]
        text = b"".join(_line(path) for path in paths)
        for done in synced:
            done.result()
    manifest = folder / MANIFEST
    manifest.write_bytes(text)
    sync(manifest)
    sync(folder)


def find_damage(folder: Path) -> str | None:
    """How a sealed folder differs from its manifest; None if it does not."""
    manifest = folder / MANIFEST
    if not manifest.exists():
        return f"it has no {MANIFEST}, as where an earlier version of fastalign wrote it"
    try:
        written = manifest.read_bytes()
        lines = {path.name: _line(path) for path in sorted(folder.glob("*.pt"))}
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read: {error.strerror}"
    if b"".join(lines.values()) == written:
        return None
    listed = [name.decode() for name in re.findall(rb"^[0-9a-f]{64}  ([\w.-]+)$", written, re.MULTILINE)]
    if missing := [name for name in listed if name not in lines]:
        return f"{missing[0]}, which {MANIFEST} lists, is missing"
    changed = [name for name, line in lines.items() if line not in written]
    return f"{' and '.join(changed) or 'its list of files'} does not agree with {MANIFEST}"


def _line(path: Path) -> bytes:
    with path.open("rb") as file:
        return f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n".encode()
