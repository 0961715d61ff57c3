"""The rows of one file: JSON, CSV, text or Parquet.

Values stay as written, or the file is refused with file and row.

JSON is read by the standard library: numbers, texts and nulls stay what they are, and columns may mix
types. What Python would change silently is refused: a key twice in one object, NaN, numbers beyond a
double, half a surrogate pair.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from .errors import DataError, one_line
from .row_parts import Part, TablePart, TextPart
from .strict_json import Fault, decode_object, skip_space

# A file that begins so is not what one of READERS' endings promises.
MAGIC = {
    b"\xff\xfe": ("UTF-16 text", "save it as UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "save it as UTF-8"),
    b"\x1f\x8b": ("data compressed by gzip", "name it .gz"),
    b"\x28\xb5\x2f\xfd": ("data compressed by zstd", "name it .zst"),
    b"PAR1": ("Parquet", "name it .parquet"),
    b"PK\x03\x04": ("a zip archive", "unpack it"),
}
LINE_END = b"\n"
DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)  # what decompressors raise


def read_file(path: str) -> Part:
    """The rows of one file, read according to the ending of its name."""
    reader = READERS.get(file_kind(path))
    if reader is None:
        raise DataError(
            f"{path}: got a {''.join(Path(path).suffixes[-2:]) or 'file without ending'}, expected "
            f"{expected_files()}"
        )
    return reader(path)


# Files


def file_kind(path: str) -> str:
    """The ending that decides how to read a file, without the compression's. It may be none of READERS."""
    *_, before, last = ["", "", *(suffix.lower() for suffix in Path(path).suffixes)]
    return before if last in COMPRESSED and before != ".parquet" else last


def expected_files() -> str:
    compressed = ", ".join(COMPRESSED)
    return f"a file ending in {', '.join(READERS)}; all but .parquet may be compressed as {compressed}"


def _open_zst(path: str, mode: str) -> IO[bytes]:
    stream: Any = pa.CompressedInputStream(pa.OSFile(path), "zstd")
    return io.BufferedReader(stream)


COMPRESSED: dict[str, Callable[[str, Any], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zst,
}


def _open(path: str) -> Any:
    """The file's bytes, decompressed. Refuses a file that is not of the kind that its name says."""
    file = COMPRESSED.get(Path(path).suffix.lower(), open)(path, "rb")
    begin = file.peek(4)
    for magic, (found, remedy) in MAGIC.items():
        if begin.startswith(magic):
            file.close()
            raise DataError(f"{path}: got {found}, expected the kind that the name says: {remedy}")
    return file


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"got bytes that are not UTF-8 ({error.reason}), expected UTF-8"


def _not_json(error: json.JSONDecodeError, expected: str) -> str:
    return f"got no JSON ({error.msg} at column {error.colno}), expected {expected}"


def _unreadable(error: BaseException) -> str:
    return f"got a file that cannot be read ({one_line(error)}), expected a whole one"


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """Each line with its number, without its end (LF, CR LF or CR) and without a byte order mark."""
    number = 0
    try:
        with _open(path) as file:
            for block in file:
                for line in (
                    block.removesuffix(b"\n").removesuffix(b"\r").split(b"\r") if b"\r" in block else [block]
                ):
                    number += 1
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, row {number}: {_not_utf8(error)}") from error
    except DAMAGE as error:
        raise DataError(f"{path}, after row {number}: {_unreadable(error)}") from error


# JSON


def _read_json(path: str) -> TextPart:
    return _read_array(path) if _holds_array(path) else _read_objects(path)


def _holds_array(path: str) -> bool:
    try:
        with _open(path) as file:
            begin = file.read(3).removeprefix(b"\xef\xbb\xbf") or file.read(4096)
            while begin and not begin.strip():
                begin = file.read(4096)
            return bool(begin.lstrip().startswith(b"["))
    except DAMAGE as error:
        raise DataError(f"{path}, after row 0: {_unreadable(error)}") from error


def _read_objects(path: str) -> TextPart:
    """One object per line. A row's number is that of its line."""
    part = TextPart(path)
    for row, line in _lines(path):
        if not line.strip():
            continue
        if line.startswith("\ufeff"):
            raise DataError(
                f"{path}, row {row}: got a byte order mark (U+FEFF) before the object, expected one at the "
                "beginning of the file alone: files that have one were joined; remove it"
            )
        try:
            record, end = decode_object(line, skip_space(line, 0))
            end = skip_space(line, end)
            if end < len(line):
                raise json.JSONDecodeError("Extra data", line, end)
        except json.JSONDecodeError as error:
            forms = "an object a line" + ", or an array of objects" * path.endswith(".json")
            raise DataError(f"{path}, row {row}: {_not_json(error, forms)}") from error
        except Fault as fault:
            raise DataError(f"{path}, row {row}: {fault}") from fault
        part.add(row, record, line.encode())
    return part


def _read_array(path: str) -> TextPart:
    """Objects of one array. A row's number is its index from 1. Syntax errors name the line."""
    part = TextPart(path)
    data = b""
    try:
        with _open(path) as file:
            data = file.read()
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, line {data.count(LINE_END, 0, error.start) + 1}: {_not_utf8(error)}"
        ) from error
    except DAMAGE as error:
        raise DataError(f"{path}: {_unreadable(error)}") from error
    del data
    row = 0
    try:
        place = skip_space(text, skip_space(text, 0) + 1)
        while row or text[place : place + 1] != "]":
            row += 1
            record, end = decode_object(text, place)
            part.add(row, record, text[place:end].encode())
            place = skip_space(text, end)
            if text[place : place + 1] == "]":
                break
            if text[place : place + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
            place = skip_space(text, place + 1)
        if skip_space(text, place + 1) < len(text):
            raise json.JSONDecodeError("Extra data", text, skip_space(text, place + 1))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: {_not_json(error, 'one array')}") from error
    except Fault as fault:
        raise DataError(f"{path}, row {row}: {fault}") from fault
    return part


# CSV, text and Parquet

LABELS = {"true": True, "false": False}
OTHER_MARKS = re.compile(r"\w+([;\t|])\w+(?:\1\w+)*")  # between the names of columns


def _read_csv(path: str) -> TextPart:
    part = TextPart(path)
    limit = csv.field_size_limit(2**31 - 1)  # Python's own is 128 KiB
    row = 1
    try:
        # newline="": what lies within quotes keeps its line ends
        with io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise Fault(
                    f"got column {max(header, key=header.count)!r} twice in the header, expected it once"
                )
            if len(header) == 1 and (other := OTHER_MARKS.fullmatch(header[0])):
                raise Fault(f"got a header with {other[1]!r} between columns, expected commas")
            while True:
                row = reader.line_num + 1
                values = next(reader, None)
                if values is None:
                    return part
                if not values:  # a blank line
                    continue
                if len(values) != len(header):
                    raise Fault(f"got {len(values)} values, expected {len(header)}, as in the header")
                record = {name: _csv_value(name, value) for name, value in zip(header, values, strict=True)}
                part.add(row, record, json.dumps(record, ensure_ascii=False).encode())
    except Fault as fault:
        raise DataError(f"{path}, row {row}: {fault}") from fault
    except csv.Error as error:
        raise DataError(f"{path}, row {row}: got a line that is not CSV ({error}), expected CSV") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, after row {row - 1}: {_not_utf8(error)}") from error
    except DAMAGE as error:
        raise DataError(f"{path}, after row {row - 1}: {_unreadable(error)}") from error
    finally:
        csv.field_size_limit(limit)


def _csv_value(column: str, written: str) -> Any:
    """The text as written. `label` becomes a truth value and `margin` a number if possible."""
    if column == "label":
        return LABELS.get(written.strip().lower(), written)
    if column == "margin":
        try:
            return float(written)
        except ValueError:
            return written
    return written


def _read_text(path: str) -> TextPart:
    part = TextPart(path)
    for row, line in _lines(path):
        if line.strip():
            part.add(row, {"text": line}, json.dumps({"text": line}, ensure_ascii=False).encode())
    return part


def _read_parquet(path: str) -> TablePart:
    tables = []
    first = 1
    rows = 0
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            tables.append(file.read_row_group(group))
            first += rows
        table = pa.concat_tables(tables) if tables else file.schema_arrow.empty_table()
    except (pa.ArrowException, OSError, ValueError) as error:
        where, found = (
            (f", rows {first} to {first + rows - 1}", "damaged rows") if rows else ("", "no Parquet")
        )
        found += f" ({one_line(error)})"
        raise DataError(f"{path}{where}: got {found}, expected a whole Parquet file") from error
    names = table.column_names
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise DataError(f"{path}: got column {twice[0]!r} {names.count(twice[0])} times, expected it once")
    return TablePart(path, table)


READERS: dict[str, Callable[[str], Part]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".txt": _read_text,
}
