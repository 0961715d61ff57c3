"""The rows of one file or data set, as they are kept in memory."""

import hashlib
import json
from array import array
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import pyarrow as pa

from .errors import DataError, one_line

BATCH = 1000  # rows read at once


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


class TextPart:
    """Rows as JSON objects in UTF-8, one after another in a buffer and parsed at each read.

    `add` all rows before the first read.
    """

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
        """Add a row with this number in the file and these columns."""
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
    """The rows of an Arrow table. Null fields of structs are left out, at any depth.

    Arrow gives all structs of a column the same fields, and null if a message, a tool or a call has no such
    key. Chat templates test whether a key exists. A null in a column or in a map is kept, because it was
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
            # Converting maps takes three times as long, also in columns without maps. A field with "map<"
            # in its name only costs time.
            values = (
                column.to_pylist(maps_as_pydicts="strict")
                if "map<" in str(column.type)
                else column.to_pylist()
            )
        # Bad UTF-8, a map's key twice, dates beyond Python's
        except (
            ValueError,
            KeyError,
            ArithmeticError,
            pa.ArrowException,
        ) as error:
            if end - begin > 1:
                return [self._column(name, row, row + 1)[0] for row in range(begin, end)]
            reason = (
                f"not UTF-8: {error.reason}" if isinstance(error, UnicodeDecodeError) else one_line(error)
            )
            raise DataError(
                f"{self.path}, row {begin + 1}: column {name!r}: got a value that cannot be read ({reason}), "
                "expected one that Python can hold"
            ) from error
        return _clean(self._cleaners[name], values)


class DatasetPart:
    """The rows of a `datasets.Dataset`. Null fields of structs are left out as in TablePart."""

    def __init__(self, dataset: Any) -> None:
        self.columns = list(dataset.column_names)
        self._dataset = dataset.with_format(None)
        self._cleaners = {field.name: _null_remover(field.type) for field in dataset.features.arrow_schema}

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, begin: int, end: int, columns: Sequence[str]) -> list[dict[str, Any]]:
        # datasets takes up to ten times as long row by row
        batch = self._dataset.select_columns(list(columns))[begin:end]
        values = {name: _clean(self._cleaners[name], batch[name]) for name in columns}
        return [{name: values[name][place] for name in columns} for place in range(end - begin)]

    def place(self, index: int) -> tuple[str, int]:
        return self._dataset.info.dataset_name or "", index + 1

    def update(self, digest: "hashlib.blake2b") -> None:
        for table in self._dataset.with_format("arrow").iter(BATCH):
            _digest_table(digest, table)


Cleaner = Callable[[Any], Any]


def _null_remover(kind: pa.DataType) -> Cleaner | None:
    """A function that removes null fields of structs from a value of this type; None without structs."""
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
