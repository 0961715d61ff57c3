"""Files and folders that fastalign writes are whole or absent, also on disks that cannot sync a folder."""

import errno
import os
from pathlib import Path

import pytest

from fastalign.stages.runs import files


@pytest.mark.parametrize("write", [files.new_file, files.new_folder], ids=["file", "folder"])
def test_what_fails_while_it_is_written_leaves_nothing(write, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"), write(tmp_path / "made") as unfinished:
        (unfinished if write is files.new_file else unfinished / "part").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_what_fails_while_it_is_written_keeps_what_was_there(tmp_path: Path) -> None:
    files.write_text(tmp_path / "made", "whole")
    with pytest.raises(OSError, match="No space left"), files.new_file(tmp_path / "made") as unfinished:
        unfinished.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["whole"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_disk_that_cannot_sync_folders_is_served_and_one_that_cannot_sync_files_is_not(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")

    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    files.sync(tmp_path)
    with pytest.raises(OSError, match=os.strerror(number)):
        files.sync(tmp_path / "file")


def test_a_folder_whose_sync_fails_otherwise_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        files.sync(tmp_path)
