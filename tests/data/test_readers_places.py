"""Where rows come from: globs, folders, the cache of the hub, and the fingerprint of what was read."""

import shutil
import time
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict

from fastalign.data import DataError, Rows, load_rows
from fastalign.data.rows import as_rows
from tests.data.files import parquet, same, write, write_bytes

# Which files


def test_missing_files_are_told_with_close_names(tmp_path: Path) -> None:
    write(tmp_path / "chats.jsonl.gz", [])
    with pytest.raises(
        DataError, match=r"chats.jsonl: got no such file, expected one; did you mean .*/chats.jsonl.gz\?$"
    ):
        load_rows(str(tmp_path / "chats.jsonl"))
    for name, message in (
        ("x.parquet", "got no such file, expected one$"),
        ("*.parquet", "got a pattern that matches no file"),
        ("folder/", "got no such file"),
    ):
        with pytest.raises(DataError, match=message):
            load_rows(str(tmp_path / name))
    with pytest.raises(ValueError, match=r"split: got 'test', expected 'train' for files"):
        load_rows(write(tmp_path / "a.jsonl", [{"text": "x"}]), split="test")


def test_a_glob_may_mix_formats_and_places_stay(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", {"text": ["1", "2"]})
    write(tmp_path / "b.jsonl", [{"text": "3"}, {"text": "4"}])
    write_bytes(tmp_path / "c.txt", b"\n5\n")
    rows = load_rows(str(tmp_path / "*"))
    assert rows["text"] == list("12345")
    chosen = rows.select([4, 1, 2]).select([0, 2])
    assert list(chosen) == [{"text": "5"}, {"text": "3"}] and len(chosen) == 2 and chosen[-1] == {"text": "3"}
    assert [chosen.place(index) for index in range(2)] == [
        (str(tmp_path / "c.txt"), 2),
        (str(tmp_path / "b.jsonl"), 1),
    ]
    with pytest.raises(IndexError):
        chosen[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set" / "data").mkdir(parents=True)
    return tmp_path / "set"


def test_a_folder_is_read_by_its_splits_and_keeps_what_is_written(folder: Path) -> None:
    values = ["2024-01-01", "5", 5, None, {"a": None}]  # dates became timestamps
    write(folder / "data" / "train-0.jsonl", [{"x": value} for value in values[:3]])
    write(folder / "data" / "train-1.jsonl", [{"x": value} for value in values[3:]])
    write(folder / "data" / "test-0.jsonl", [{"x": "test"}])
    (folder / "README.md").write_text("# A set\n")
    assert same(load_rows(str(folder))["x"], values)
    assert load_rows(str(folder), split="test")["x"] == ["test"]
    assert same(load_rows(str(folder), split="test+train[1:3]")["x"], ["test", "5", 5])
    with pytest.raises(DataError, match="set: got 'dev', expected one of train, test$"):
        load_rows(str(folder), split="dev")


def test_a_mixed_folder_says_which_files_it_left(folder: Path) -> None:
    for name in ("a", "b"):
        parquet(folder / f"{name}.parquet", {"text": [name]})
    write_bytes(folder / "data" / "c.csv", b"text\nc\n")
    for name in ("README.md", ".hidden", "LICENSE"):
        (folder / name).write_text("x")
    with pytest.warns(UserWarning, match=r"set: files that are not read: data/c.csv$"):
        assert load_rows(str(folder))["text"] == ["a", "b"]


def test_a_folder_without_data_is_refused(folder: Path) -> None:
    (folder / "README.md").write_text("x")
    with pytest.raises(DataError, match=r"set: .*expected a file ending in .jsonl") as refused:
        load_rows(str(folder))
    assert "\n" not in str(refused.value)


def test_a_folder_of_save_to_disk_is_read(folder: Path) -> None:
    shutil.rmtree(folder)
    alone = Dataset.from_dict({"text": ["x"]})
    alone.save_to_disk(folder)
    assert load_rows(str(folder))["text"] == ["x"]
    with pytest.raises(DataError, match=r"split of .*set: got 'test', expected one of train$"):
        load_rows(str(folder), split="test")
    DatasetDict({"train": alone, "test": alone}).save_to_disk(folder / "both")
    with pytest.raises(DataError, match=r"split of .*both: got 'dev', expected one of train, test$"):
        load_rows(str(folder / "both"), split="dev")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def dataset_info(*_: Any, **__: Any) -> None:
        raise ConnectionError("[Errno -2] Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)


@pytest.mark.usefixtures("no_network", "folder")
@pytest.mark.parametrize("source", ["nosuch", "nosuch/name", "nosuch/name:config", "notes.md"])
def test_an_unknown_name_without_network_is_told_at_once(source: str) -> None:
    began = time.monotonic()
    with pytest.raises(
        DataError,
        match=rf"^{source}: got no such file or folder, expected a file, a folder or a data set; "
        r"no data set.*its hub cannot be reached: .*not known$",
    ):
        load_rows(source)
    assert time.monotonic() - began < 1 and not datasets.config.HF_HUB_OFFLINE


@pytest.mark.usefixtures("no_network")
def test_a_name_in_the_cache_is_read_without_network(folder: Path) -> None:
    write(folder / "data" / "train.jsonl", [{"text": "x"}])
    datasets.load_dataset(str(folder))
    [made] = (folder.parent / "cache").rglob("*.arrow")
    cached = shutil.copytree(
        made.parent, folder.parent / "cache" / "org___other_set" / "default" / "0.0.0" / made.parent.name
    )
    (cached / made.name).rename(cached / "other_set-train.arrow")
    assert load_rows("org/other_set")["text"] == ["x"]
    with pytest.raises(
        DataError,
        match="^org/other_set: got a name, expected a file, a folder or a data set; "
        "`datasets` cannot load it: Unknown split .dev.. Should be one of",
    ):
        load_rows("org/other_set", split="dev")


# Fingerprints


def test_the_fingerprint_is_of_the_rows_and_not_of_the_path(tmp_path: Path) -> None:
    rows = [{"text": "a", "n": 1}, {"text": "b", "n": 2}]
    sources = [write(tmp_path / "a.jsonl", rows), parquet(tmp_path / "a.parquet", pa.Table.from_pylist(rows))]
    before = [load_rows(source).fingerprint for source in sources]
    assert len(set(before)) == 2
    (tmp_path / "other").mkdir()
    for source, fingerprint in zip(sources, before, strict=True):
        assert load_rows(str(shutil.copy(source, str(tmp_path / "other")))).fingerprint == fingerprint
    different = [rows[::-1], rows[:1], [rows[0], {"text": "b", "n": 3}], [rows[0], {"text": "c", "n": 2}]]
    for other in different:
        changed = [
            write(tmp_path / "b.jsonl", other),
            parquet(tmp_path / "b.parquet", pa.Table.from_pylist(other)),
        ]
        assert not {load_rows(source).fingerprint for source in changed} & set(before)
    assert load_rows(sources[0]).select([1, 0]).fingerprint not in before
    by_datasets = as_rows(Dataset.from_list(rows)).fingerprint
    assert (
        by_datasets
        == as_rows(Dataset.from_list(rows)).fingerprint
        != as_rows(Dataset.from_list(rows[::-1])).fingerprint
    )
    assert isinstance(load_rows(sources[0]), Rows)
