"""Find rows: in files, in a folder, or in a data set that `datasets` knows."""

import difflib
import glob
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from .errors import DataError, one_line
from .file_formats import READERS, expected_files, file_kind, read_file
from .row_parts import DatasetPart, Part
from .rows import NAMED, Rows

NOT_DATA = re.compile(r"^[._]|^(readme|license|notice|dataset_infos?)\b", re.IGNORECASE)


def load_rows(source: str, *, split: str = "train") -> Rows:
    """Rows of files, of a folder, or of a data set that `datasets` knows. Each row is a dict of all columns.

    `source` is one of

    - a file, or a glob (`data/*.jsonl`) of files, ending in
        .jsonl or .json: one object per line, or one array of objects. Values stay as written.
        .parquet: files may differ in types and columns. Null fields of structs are left out, at any depth:
            Arrow gives all structs of a column the same fields. A map becomes a dict.
        .csv: a header, then one record per row. Every value is text, except `label` (true or false) and
            `margin` (a number).
        .txt: one document per line, in the column `text`. Blank lines are left out.
        All but Parquet may be compressed, as in .jsonl.gz, .bz2, .xz or .zst.
    - a folder of such files. `datasets` finds those of `split` by their names. "folder:config" if its
      README has configs.
    - "name" or "name:config" of a data set that `datasets` loads.

    Raises:
        DataError: the source is missing, malformed or has no rows. It names the file and the row (from 1;
            in .jsonl, .csv and .txt the line).
        ValueError: a split is asked of plain files, which have none.
    """
    name, _, config = (source, "", "") if Path(source).is_dir() else source.partition(":")
    if Path(name).is_dir():
        rows = _read_folder(name, config or None, split)
    elif paths := _find_files(source):
        if split != "train":
            raise ValueError(f"split: got {split!r}, expected 'train' for files, which have no splits")
        rows = Rows([read_file(path) for path in paths])
    else:
        rows = _load_named(source, name, config or None, split)
    if len(rows) == 0:
        raise DataError(f"{source}: got no rows, expected at least one")
    _fingerprints[source, split] = rows.fingerprint
    return rows


def fingerprint_of(source: str, *, split: str) -> str | None:
    """The fingerprint of the rows that `load_rows` last read from `source` in this process, or None.

    The content of `source` may have changed since. A checkpoint must know the rows that its run was given.
    """
    return _fingerprints.get((source, split))


def note_fingerprint(source: str, *, split: str, fingerprint: str) -> None:
    """Let `fingerprint_of` answer for rows that another process read."""
    _fingerprints[source, split] = fingerprint


_fingerprints: dict[tuple[str, str], str] = {}


def _find_files(source: str) -> list[str]:
    """The files that `source` names; none if it may be the name of a data set."""
    if Path(source).is_file():
        return [source]
    if glob.has_magic(source):
        if found := [path for path in sorted(glob.glob(source, recursive=True)) if Path(path).is_file()]:
            return found
        raise DataError(f"{source}: got a pattern that matches no file, expected at least one file")
    if (
        file_kind(source) in READERS
        or source.startswith(("/", "./", "../", "~"))
        or (source.count("/") > 1 and "://" not in source)
    ):
        folder = Path(source).parent
        there = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        close = difflib.get_close_matches(Path(source).name, there, n=1)
        hint = f"; did you mean {folder / close[0]}?" if close else ""
        raise DataError(f"{source}: got no such file, expected one{hint}")
    return []


def _read_folder(folder: str, config: str | None, split: str) -> Rows:
    """The split's files, as `datasets` finds them by their names, read by file_formats.py where it can."""
    import datasets  # on demand: it takes half a second to import

    try:
        # A folder of datasets' save_to_disk
        if Path(folder, "state.json").is_file() or Path(folder, "dataset_dict.json").is_file():
            return Rows([DatasetPart(_saved_split(datasets.load_from_disk(folder), folder, split))])
        builder = datasets.load_dataset_builder(folder, config)
        files = {
            str(name): [str(path) for path in paths]
            for name, paths in (builder.config.data_files or {}).items()
        }
        named = [name for name in files if re.search(rf"\b{re.escape(name)}\b", split)]
        if not named:
            raise _no_such_split(folder, split, files)
        _warn_left(folder, [path for paths in files.values() for path in paths])
        if any(file_kind(path) not in READERS for paths in files.values() for path in paths):
            return Rows([DatasetPart(datasets.load_dataset(folder, config, split=split))])
        parts = {name: [read_file(path) for path in files[name]] for name in named}
        return (
            Rows(parts[split])
            if split in parts
            else _slice_splits(parts, datasets.ReadInstruction.from_spec(split))
        )
    except DataError:
        raise
    except (OSError, ValueError, LookupError, AssertionError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{folder}: got the error {one_line(error.__cause__ or error)!r}, expected {expected_files()}"
        ) from error


def _saved_split(saved: Any, folder: str, split: str) -> Any:
    """The split of what `save_to_disk` wrote. A data set that was saved alone is its only split."""
    if not isinstance(saved, Mapping):
        if split not in ("train", str(saved.split)):
            raise _no_such_split(folder, split, ["train"])
        return saved
    if split not in saved:
        raise _no_such_split(folder, split, saved)
    return saved[split]


def _no_such_split(folder: str, split: str, known: Iterable[str]) -> DataError:
    return DataError(f"split of {folder}: got {split!r}, expected one of {', '.join(known)}")


def _slice_splits(parts: Mapping[str, Sequence[Part]], instruction: Any) -> Rows:
    """The rows of a `datasets.ReadInstruction`, such as "train[:10%]+test"."""
    splits = {name: Rows(split_parts) for name, split_parts in parts.items()}
    firsts = dict(zip(splits, accumulate(map(len, splits.values()), initial=0)))
    spans = instruction.to_absolute({name: len(rows) for name, rows in splits.items()})
    numbers = {name: range(firsts[name], firsts[name] + len(rows)) for name, rows in splits.items()}
    indices = [number for span in spans for number in numbers[span.splitname][span.from_ : span.to]]
    return Rows([part for split_parts in parts.values() for part in split_parts], indices)


def _warn_left(folder: str, read: list[str]) -> None:
    used = {Path(path).resolve() for path in read}
    names = [
        path.relative_to(folder)
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.resolve() not in used
    ]
    left = [str(name) for name in names if not any(NOT_DATA.match(part) for part in name.parts)]
    if left:
        more = f" and {len(left) - NAMED} more" if len(left) > NAMED else ""
        warnings.warn(f"{folder}: files that are not read: {', '.join(left[:NAMED])}{more}", stacklevel=4)


def _load_named(source: str, name: str, config: str | None, split: str) -> Rows:
    import datasets

    unreachable = _hub_error(name)
    offline = datasets.config.HF_HUB_OFFLINE
    try:
        if unreachable is not None:  # the cache alone; `datasets` would try for 20 s
            datasets.config.HF_HUB_OFFLINE = True
        return Rows([DatasetPart(datasets.load_dataset(name, config, split=split))])
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        expected = "a file, a folder or a data set"
        reason = f"`datasets` cannot load it: {one_line(error.__cause__ or error)}"
        if not isinstance(error, OSError):
            raise DataError(f"{source}: got a name, expected {expected}; {reason}") from error
        if unreachable:
            reason = (
                "no data set of this name is in the cache of `datasets`, and its hub cannot be reached: "
                f"{unreachable}"
            )
        raise DataError(f"{source}: got no such file or folder, expected {expected}; {reason}") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def _hub_error(name: str) -> str | None:
    """Why the hub cannot be asked for a data set; None if it answers, even slowly or with a refusal."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().dataset_info(name, timeout=3)
    except (HfHubHTTPError, HFValidationError):
        return None
    except Exception as error:  # of requests or of httpx, as the hub's version has it
        return None if "Timeout" in type(error).__name__ else one_line(error)
    return None
