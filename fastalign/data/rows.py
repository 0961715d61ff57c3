"""Rows as they are written: no value changes, and each row knows its file and line.

A row is a dict of all columns; a column that the row lacks is None. Rows of JSON are kept as bytes and
parsed when they are read. So a column may mix types, and 1e6 rows take little more memory than their files.
Rows of Parquet are kept as Arrow tables.
"""

import hashlib
from array import array
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeVar

from .errors import DataError, FatalDataError
from .row_parts import BATCH, DatasetPart, Part

NAMED = 5  # rows that a message names; it counts the rest
# What to do with the columns of other formats.
HINTS = {
    "conversations": "; ShareGPT's are for fastalign sft, other stages want prompt and answers as messages",
    "instruction": "; of Alpaca's columns make 'prompt' (instruction and input) and 'completion' (output)",
    "data": "; the rows are in 'data': write them as one array, or an object a line",
}

Row = Mapping[str, Any]
T = TypeVar("T")


class Rows:
    """The rows of files one after another: an immutable sequence of dicts.

    `rows[3]` is a row, `rows["text"]` the list of a column's values, and `rows.read(columns)` iterates over
    all rows.
    """

    def __init__(self, parts: Sequence[Part], indices: Sequence[int] | None = None) -> None:
        self._parts = parts
        self._ends = list(accumulate(len(part) for part in parts))
        self._indices = indices
        self.column_names = list(dict.fromkeys(name for part in parts for name in part.columns))

    def __len__(self) -> int:
        return len(self._indices) if self._indices is not None else self._ends[-1] if self._ends else 0

    def __getitem__(self, key: int | str) -> Any:
        if isinstance(key, str):
            if key not in self.column_names:
                raise KeyError(key)
            return [row[key] for row in self.read([key])]
        part, index = self._find(key)
        return self._read(part, index, index + 1, self.column_names)[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.read()

    def read(self, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """Iterate over the rows, with these columns only."""
        names = self.column_names if columns is None else columns
        if self._indices is not None:
            for part, index in map(self._find, range(len(self))):
                yield from self._read(part, index, index + 1, names)
            return
        for part in self._parts:
            for begin in range(0, len(part), BATCH):
                yield from self._read(part, begin, min(begin + BATCH, len(part)), names)

    def select(self, indices: Sequence[int]) -> "Rows":
        """The rows of these indices, in this order. They keep their places."""
        return Rows(
            self._parts, [self._indices[index] if self._indices is not None else index for index in indices]
        )

    def place(self, index: int) -> tuple[str, int]:
        """The file of a row ("" if it has none) and the row's number in it, from 1 as an editor shows it."""
        part, place = self._find(index)
        return part.place(place)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all rows in order. A file that was moved or copied has the same.

        Parquet files have the same only if their row groups are the same too.
        """
        digest = hashlib.blake2b(digest_size=16)
        for part in self._parts:
            part.update(digest)
        digest.update(array("q", self._indices or ()).tobytes())
        return digest.hexdigest()

    def _find(self, index: int) -> tuple[Part, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        place = range(len(self))[index]
        if self._indices is not None:
            place = self._indices[place]
        number = bisect_right(self._ends, place)
        return self._parts[number], place - (self._ends[number - 1] if number else 0)

    def _read(self, part: Part, begin: int, end: int, names: Sequence[str]) -> list[dict[str, Any]]:
        there = set(part.columns)
        read = part.read(begin, end, [name for name in names if name in there])
        if len(there) == len(self.column_names):
            return read
        return [{name: row.get(name) for name in names} for row in read]


def as_rows(rows: Any) -> Rows:
    """`rows` themselves, or the rows of a `datasets.Dataset`."""
    return rows if isinstance(rows, Rows) else Rows([DatasetPart(rows)])


def read_each(
    rows: Any, columns: Sequence[str], convert: Callable[[Row], T], optional: Sequence[str] = ()
) -> list[T]:
    """Apply `convert` to these columns of each row, and to the `optional` ones that exist.

    The DataErrors that it raises become one that names the rows.
    """
    done = []
    faults: dict[str, list[int]] = defaultdict(list)
    there = [*columns, *(column for column in optional if column in rows.column_names)]
    for index, row in enumerate(as_rows(rows).read(there)):
        try:
            done.append(convert(row))
        except FatalDataError as fault:
            refuse_rows(rows, faults | {str(fault): [index]})
        except DataError as fault:
            faults[str(fault)].append(index)
    refuse_rows(rows, faults)
    return done


def need_columns(rows: Any, *columns: str) -> None:
    """Raise DataError if `rows` lack one of the columns."""
    if missing := [repr(column) for column in columns if column not in rows.column_names]:
        hint = next((hint for column, hint in HINTS.items() if column in rows.column_names), "")
        there = ", ".join(rows.column_names)
        raise DataError(f"{name_rows(rows)}columns: got {there}, expected {' and '.join(missing)} too{hint}")


def name_rows(rows: Any, indices: Sequence[int] = ()) -> str:
    """The place of rows, as in "a.jsonl, rows 3, 9; b.jsonl, row 1 and 7 more: ".

    Without indices it is "a.jsonl: ".
    """
    by_file: dict[str, list[str]] = defaultdict(list)
    for file, number in map(as_rows(rows).place, indices[:NAMED] or [0]):
        by_file[file].append(str(number))
    if not indices:
        return "".join(f"{file}: " for file in by_file if file)
    named = [
        f"{f'{file}, ' if file else ''}{'rows' if len(numbers) > 1 else 'row'} {', '.join(numbers)}"
        for file, numbers in by_file.items()
    ]
    more = f" and {len(indices) - NAMED} more" if len(indices) > NAMED else ""
    return f"{'; '.join(named)}{more}: "


def refuse_rows(rows: Any, faults: Mapping[str, Sequence[int]]) -> None:
    """Raise DataError if a fault has indices into `rows`, with a line per fault that names its rows."""
    lines = [
        f"{name_rows(rows, list(dict.fromkeys(indices)))}{fault}"
        for fault, indices in faults.items()
        if indices
    ]
    if lines:
        more = [f"and {len(lines) - NAMED} more faults"] if len(lines) > NAMED else []
        raise DataError("\n".join(lines[:NAMED] + more))
