"""Rows as they are written: a table of our own, in which no value changes, and whose rows know their file and
line.

A row is a dict of all columns; a column that it lacks is None. Rows of JSON are kept as bytes and parsed when
they are read, so a mixed column stays mixed and 1e6 rows take little more memory than their files. Rows of
Parquet are kept as Arrow tables.
"""

import hashlib
import json
from array import array
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import accumulate
from typing import Any, Protocol, TypeVar

import pyarrow as pa

from .messages import DataError, FatalDataError, Row

BATCH = 1000  # rows read at once
NAMED = 5  # rows that a message names; it counts the others

T = TypeVar("T")


class Part(Protocol):
    """The rows of one file."""

    @property
    def columns(self) -> list[str]:
        """The names of its columns."""

    def __len__(self) -> int: ...

    def read(self, begin: int, end: int, columns: Sequence[str]) -> list[dict[str, Any]]:
        """Rows [begin, end) with these columns of the part."""

    def place(self, index: int) -> tuple[str, int]:
        """The file of a row, "" if it has none, and the row's number in it, from 1."""

    def update(self, digest: "hashlib.blake2b") -> None:
        """Add all rows to a digest."""


class Rows:
    """The rows of files one after another: an immutable sequence of dicts.

    `rows[3]` is a row, `rows["text"]` the list of a column's values, `rows.read(columns)` passes over all
    rows.
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
        """Each row, with these columns alone."""
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
        """The file of a row, "" if it has none, and the row's number in it, from 1 as an editor shows it."""
        part, place = self._find(index)
        return part.place(place)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all rows, in their order: the same for the same rows in a file that was moved or copied.

        Parquet files count as the same only if their row groups are the same too.
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


class TextPart:
    """Rows as JSON objects in UTF-8, one after another in a buffer, parsed at each read. `add` them before
    the first read."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._names: dict[str, None] = {}
        self._buffer = bytearray()
        self._ends = array("q", [0])
        self._numbers = array("q")

    @property
    def columns(self) -> list[str]:
        return list(self._names)

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, number: int, names: Mapping[str, Any], written: bytes) -> None:
        """A row of this number in the file, with these columns."""
        self._names.update(dict.fromkeys(names))
        self._buffer += written
        self._ends.append(len(self._buffer))
        self._numbers.append(number)

    def read(self, begin: int, end: int, columns: Sequence[str]) -> list[dict[str, Any]]:
        ends = self._ends[begin : end + 1]
        written = [json.loads(self._buffer[first:last].decode()) for first, last in zip(ends, ends[1:])]
        return [{name: record.get(name) for name in columns} for record in written]

    def place(self, index: int) -> tuple[str, int]:
        return self.path, self._numbers[index]

    def update(self, digest: "hashlib.blake2b") -> None:
        digest.update(self._buffer)


class TablePart:
    """The rows of an Arrow table, but that fields of structs that are null are left out, at any depth.

    Arrow gives all structs of a column the same fields, and null where a message, a tool or a call has no
    such key. Chat templates ask whether a key is there. A null in a column or in a map is kept: there, it was
    written.
    """

    def __init__(self, path: str, table: pa.Table) -> None:
        self.path = path
        self.columns = list(table.column_names)
        self._table = table
        self._cleaners = {field.name: _null_remover(field.type) for field in table.schema}

    def __len__(self) -> int:
        return len(self._table)

    def read(self, begin: int, end: int, columns: Sequence[str]) -> list[dict[str, Any]]:
        values = {name: self._column(name, begin, end) for name in columns}
        return [{name: values[name][place] for name in columns} for place in range(end - begin)]

    def place(self, index: int) -> tuple[str, int]:
        return self.path, index + 1

    def update(self, digest: "hashlib.blake2b") -> None:
        _digest_table(digest, self._table)

    def _column(self, name: str, begin: int, end: int) -> list[Any]:
        try:
            column = self._table.column(name).slice(begin, end - begin)
            # Conversion of maps takes three times as long, for columns without maps too. A field named so
            # only loses the time.
            values = (
                column.to_pylist(maps_as_pydicts="strict")
                if "map<" in str(column.type)
                else column.to_pylist()
            )
        except (
            ValueError,
            KeyError,
            ArithmeticError,
            pa.ArrowException,
        ) as error:  # bad UTF-8, a map's key twice, dates beyond Python's
            if end - begin > 1:
                return [self._column(name, row, row + 1)[0] for row in range(begin, end)]
            reason = (
                f"not UTF-8: {error.reason}" if isinstance(error, UnicodeDecodeError) else one_line(error)
            )
            raise DataError(
                f"{self.path}, row {begin + 1}: column {name!r} cannot be read: {reason}"
            ) from error
        return _clean(self._cleaners[name], values)


class DatasetPart:
    """The rows of a `datasets.Dataset`, with the nulls of its structs left out as in TablePart."""

    def __init__(self, dataset: Any) -> None:
        self.columns = list(dataset.column_names)
        self._dataset = dataset.with_format(None)
        self._cleaners = {field.name: _null_remover(field.type) for field in dataset.features.arrow_schema}

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, begin: int, end: int, columns: Sequence[str]) -> list[dict[str, Any]]:
        batch = self._dataset.select_columns(list(columns))[
            begin:end
        ]  # datasets takes up to ten times as long row by row
        values = {name: _clean(self._cleaners[name], batch[name]) for name in columns}
        return [{name: values[name][place] for name in columns} for place in range(end - begin)]

    def place(self, index: int) -> tuple[str, int]:
        return self._dataset.info.dataset_name or "", index + 1

    def update(self, digest: "hashlib.blake2b") -> None:
        for table in self._dataset.with_format("arrow").iter(BATCH):
            _digest_table(digest, table)


def as_rows(rows: Any) -> Rows:
    """`rows` themselves, or those of a `datasets.Dataset`."""
    return rows if isinstance(rows, Rows) else Rows([DatasetPart(rows)])


def read_each(
    rows: Any, columns: Sequence[str], convert: Callable[[Row], T], optional: Sequence[str] = ()
) -> list[T]:
    """`convert` of these columns of every row, and of the `optional` ones that there are.

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
    """Raise DataError where `rows` lack one of the columns."""
    if missing := [repr(column) for column in columns if column not in rows.column_names]:
        hint = "; ShareGPT's are for fastalign sft, other stages want prompt and answers as messages" * (
            "conversations" in rows.column_names
        )
        there = ", ".join(rows.column_names)
        raise DataError(
            f"{name_rows(rows)}no column {' and no column '.join(missing)}; there are: {there}{hint}"
        )


def name_rows(rows: Any, indices: Sequence[int] = ()) -> str:
    """As in "a.jsonl, rows 3, 9; b.jsonl, row 1 and 7 more: ", or "a.jsonl: " without indices."""
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
    """Raise DataError where a fault has indices into `rows`, with a line for each fault that names its
    rows."""
    lines = [
        f"{name_rows(rows, list(dict.fromkeys(indices)))}{fault}"
        for fault, indices in faults.items()
        if indices
    ]
    if lines:
        more = [f"and {len(lines) - NAMED} more faults"] if len(lines) > NAMED else []
        raise DataError("\n".join(lines[:NAMED] + more))


def one_line(error: BaseException) -> str:
    """The message of an error, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


Cleaner = Callable[[Any], Any]


def _null_remover(kind: pa.DataType) -> Cleaner | None:
    """What takes the null fields out of the structs of a value of this type; None for a type without
    structs."""
    if isinstance(kind, pa.BaseExtensionType):
        return _null_remover(kind.storage_type)
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return _null_remover(kind.value_type)
    if pa.types.is_struct(kind):
        inner_fields = {field.name: cleaner for field in kind if (cleaner := _null_remover(field.type))}
        return partial(_clean_struct, inner_fields) if inner_fields else _clean_flat_struct
    if pa.types.is_map(kind):
        inner = _null_remover(kind.item_type)
        return inner and partial(_clean_map, inner)
    if hasattr(kind, "value_type"):  # every sort of list
        inner = _null_remover(kind.value_type)
        return inner and partial(_clean, inner)
    return None


def _clean(cleaner: Cleaner | None, values: Any) -> Any:
    return [cleaner(value) for value in values] if cleaner and isinstance(values, list) else values


def _clean_map(cleaner: Cleaner, value: Any) -> Any:
    return {name: cleaner(item) for name, item in value.items()} if isinstance(value, dict) else value


def _clean_struct(cleaners: Mapping[str, Cleaner], value: Any) -> Any:
    if not isinstance(value, dict):  # null, or what datasets made of it, such as an image
        return value
    return {
        name: cleaners[name](item) if name in cleaners else item
        for name, item in value.items()
        if item is not None
    }


def _clean_flat_struct(value: Any) -> Any:
    return (
        {name: item for name, item in value.items() if item is not None} if isinstance(value, dict) else value
    )


def _digest_table(digest: "hashlib.blake2b", table: pa.Table) -> None:
    digest.update(table.schema.to_string(show_schema_metadata=False, show_field_metadata=False).encode())
    for batch in table.to_batches():
        digest.update(batch.serialize())
