"""Readers: what is written comes through unchanged, or is refused with file and row."""

import bz2
import csv
import gzip
import json
import lzma
import random
import re
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from fastalign.data import DataError, load_rows
from tests.data.files import ODD, parquet, same, write, write_bytes

# JSON


def random_value(generator: random.Random, depth: int) -> Any:
    kind = generator.randrange(9 if depth else 7)
    if kind == 0:
        return generator.choice(ODD)
    if kind == 1:
        return "".join(generator.choice(string.printable + "äß世😀") for _ in range(generator.randrange(12)))
    if kind == 2:
        return generator.randint(-(10 ** generator.randrange(1, 40)), 10 ** generator.randrange(1, 40))
    if kind == 3:
        return generator.uniform(-1, 1) * 10.0 ** generator.randint(-300, 300)
    if kind == 4:
        return generator.random()
    if kind in (5, 6):
        return generator.choice([None, True, False])
    if kind == 7:
        return [random_value(generator, depth - 1) for _ in range(generator.randrange(4))]
    return {
        generator.choice([*ODD, "a", "b", "c"]): random_value(generator, depth - 1)
        for _ in range(generator.randrange(4))
    }


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.zst"])
@pytest.mark.parametrize("escaped", [False, True])
def test_what_is_written_as_json_is_read_unchanged(tmp_path: Path, name: str, escaped: bool) -> None:
    generator = random.Random(f"{name} {escaped}")
    written = [
        {column: random_value(generator, 3) for column in ("a", "b", "c") if generator.random() < 0.8}
        for _ in range(2500)
    ]
    if name.startswith("a.jsonl"):
        text = "".join(json.dumps(row, ensure_ascii=escaped) + "\n" for row in written)
    else:
        text = json.dumps(written, ensure_ascii=escaped, indent=generator.choice([None, 1]))
    opener: Any = {".gz": gzip.open, ".zst": write_zst}.get(Path(name).suffix, open)
    with opener(tmp_path / name, "wb") as file:
        file.write(text.encode())
    rows = load_rows(str(tmp_path / name))
    expected = [{column: row.get(column) for column in rows.column_names} for row in written]
    assert sorted(rows.column_names) == ["a", "b", "c"] and len(rows) == len(written)
    assert same(list(rows), expected)
    assert same(
        [rows[index] for index in (0, 999, 1000, -1)], [expected[index] for index in (0, 999, 1000, -1)]
    )


def write_zst(path: Path, mode: str) -> Any:
    return pa.CompressedOutputStream(str(path), "zstd")


@pytest.mark.parametrize(
    "values",
    [
        [1, "5", "null", "[1]", None, True],  # a mixed column: "5" was 5, "null" None and "[1]" a list
        ["4", "3.10", "false", "true", "null"],
        [1.5e-11, 0.1234567890123456, 2.5e-300],  # were cut at 10 decimals
        [2**64, -(2**70), 10**400, 1],  # were text
        [[1, "a"], {"a": None}, {}, [], [{"b": None}, {}]],
        [{"a": 1}, {"a": None}, {"b": "1"}],  # a null is not an absent key
    ],
)
def test_values_that_were_changed_are_kept(tmp_path: Path, values: list[Any]) -> None:
    path = write(tmp_path / "a.jsonl", [{"x": value} for value in values])
    assert same(load_rows(path)["x"], values)
    (tmp_path / "a.json").write_text(json.dumps([{"x": value} for value in values]))
    assert same(load_rows(str(tmp_path / "a.json"))["x"], values)


def test_a_column_that_a_row_lacks_is_none_and_a_column_may_have_any_name(tmp_path: Path) -> None:
    rows = load_rows(write(tmp_path / "a.jsonl", [{"__row__": 1}, {"": 2, "file:row": None}]))
    assert list(rows) == [
        {"__row__": 1, "": None, "file:row": None},
        {"__row__": None, "": 2, "file:row": None},
    ]
    assert list(load_rows(parquet(tmp_path / "a.parquet", {"__row__": [7]}))) == [{"__row__": 7}]


@pytest.mark.parametrize(
    "content",
    [
        b'\xef\xbb\xbf{"x": 1}\n{"x": 2}\n',
        b'{"x": 1}\r\n\r\n{"x": 2}\r\n',
        b'{"x": 1}\r{"x": 2}',
        b'\n \n[{"x": 1},\n {"x": 2}]\n\n',
        b'\xef\xbb\xbf\n[{"x": 1}, {"x": 2}]',
        b'\xef\xbb\xbf[{"x": 1}\n,{"x": 2}\r\n]\r\n',
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_byte_order_marks_line_ends_and_arrays_behind_blank_lines_are_read(
    tmp_path: Path, name: str, content: bytes
) -> None:
    assert load_rows(write_bytes(tmp_path / name, content))["x"] == [1, 2]


DEEP = b'{"x": ' + b"[" * 1000 + b"]" * 1000 + b"}"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"text": "x"}\n\n{"text": \n',
            "a.jsonl, row 3: got no JSON (Expecting value at column 10)",
        ),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": "y',
            "a.jsonl, row 2: got no JSON (Unterminated string starting at at column 10)",
        ),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": "\xc3',
            "a.jsonl, row 2: got bytes that are not UTF-8 (unexpected end of data)",
        ),
        ("a.jsonl", b'{"text": "x"}\n["x"]\n', "a.jsonl, row 2: got list, expected a JSON object"),
        (
            "a.jsonl",
            b'{"text": "x"} {"text": "y"}\n',
            "a.jsonl, row 1: got no JSON (Extra data at column 15)",
        ),
        (
            "a.jsonl",
            b'{"text": "\xff"}\n',
            "a.jsonl, row 1: got bytes that are not UTF-8 (invalid start byte)",
        ),
        (
            "a.jsonl",
            b'{"text": "\\ud83d\\ude00"}\n{"text": "\\ud83d"}\n',
            "a.jsonl, row 2: got a text that is not Unicode (surrogates not allowed)",
        ),
        ("a.jsonl", b'{"x": 1}\n{"x": 1, "x": 2}\n', "a.jsonl, row 2: got key 'x' twice in one object"),
        (
            "a.jsonl",
            b'{"x": [{"y": 1, "z": 1, "y": 1}]}\n',
            "a.jsonl, row 1: got key 'y' twice in one object",
        ),
        ("a.jsonl", b'{"x": NaN}\n', "a.jsonl, row 1: got NaN, expected JSON: write null"),
        ("a.jsonl", b'{"x": [-Infinity]}\n', "a.jsonl, row 1: got -Infinity, expected JSON: write null"),
        (
            "a.jsonl",
            b'{"x": 1e400}\n',
            "a.jsonl, row 1: got number 1e400, expected one in the range of doubles",
        ),
        (
            "a.jsonl",
            b'{"x": -0.5e-400}\n',
            "a.jsonl, row 1: got number -0.5e-400, expected one in the range of doubles",
        ),
        (
            "a.jsonl",
            b'{"x": ' + b"9" * 5000 + b"}\n",
            "a.jsonl, row 1: got a whole number of too many digits, expected at most 4300",
        ),
        ("a.jsonl", b'{"x": 1}\n' + DEEP, "a.jsonl, row 2: got more than 200 nested levels"),
        (
            "a.jsonl",
            b'{"x": 1}\n' + DEEP.replace(b"[" * 700, b"").replace(b"]" * 700, b""),
            "row 2: got more than 200 nested levels",
        ),
        ("a.json", b'[{"x": 1},\n' + DEEP + b"]", "a.json, row 2: got more than 200 nested levels"),
        ("a.json", b'[{"x": 1}, {"x": NaN}]', "a.json, row 2: got NaN, expected JSON: write null"),
        ("a.json", b'[{"text": "x"}, 3]', "a.json, row 2: got int, expected a JSON object"),
        ("a.json", b'[{"text": "x"},\n', "a.json, line 2: got no JSON (Expecting value at column 1)"),
        (
            "a.json",
            b'[{"text": "x"}\n{"text": "y"}]',
            "a.json, line 2: got no JSON (Expecting ',' delimiter at column 1)",
        ),
        ("a.json", b'[{"text": "x"}]\n[]', "a.json, line 2: got no JSON (Extra data at column 1)"),
        ("a.json", b'[{"text": "x"}]]', "a.json, line 1: got no JSON (Extra data at column 16)"),
        (
            "a.json",
            b'[{"text": "x"},\n{"text": "\xff"}]',
            "a.json, line 2: got bytes that are not UTF-8 (invalid start byte)",
        ),
        (
            "a.json.gz",
            gzip.compress(b'[{"x": 1}' + b" " * 20_000, mtime=0)[:-9],
            "a.json.gz: got a file that cannot be read (Compressed file ended before",
        ),
        ("a.json", b'{\n "data": []\n}', "expected an object a line, or an array of objects"),
        ("a.jsonl", b"", "a.jsonl: got no rows"),
        ("a.jsonl", b"\xef\xbb\xbf\n", "a.jsonl: got no rows"),
        ("a.json", b"[ ]", "a.json: got no rows"),
        ("a.csv", b"", "a.csv: got no rows"),
        ("a.csv", b"text\n", "a.csv: got no rows"),
        ("a.csv", b"text;label\nx;y\n", "a.csv, row 1: got a header with ';' between columns"),
        ("a.csv", b"text\tlabel\nx\ty\n", r"a.csv, row 1: got a header with '\\t' between columns"),
        ("a.jsonl", b'{"a": 1}\n\xef\xbb\xbf{"a": 1}\n', "a.jsonl, row 2: got a byte order mark"),
        ("a.txt", b"\n \n", "a.txt: got no rows"),
        (
            "a.jsonl",
            '{"x": 1}'.encode("utf-16"),
            "a.jsonl: got UTF-16 text, expected the kind that the name says: save it as UTF-8",
        ),
        (
            "a.jsonl",
            gzip.compress(b'{"x": 1}', mtime=0),
            "a.jsonl: got data compressed by gzip, expected the kind that the name says: name it .gz",
        ),
        (
            "a.jsonl.gz",
            b'{"x": 1}\n',
            "a.jsonl.gz, after row 0: got a file that cannot be read (Not a gzipped file",
        ),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"x": 1}\n' * 50, mtime=0)[:-9],
            "a.jsonl.gz, after row .*: got a file that cannot be read (Compressed file ended before",
        ),
        (
            "a.csv.bz2",
            bz2.compress(b"text\nx\n")[:-9],
            "a.csv.bz2, after row .*: got a file that cannot be read (Compressed file ended before",
        ),
        ("a.csv", b"text,label\nx,true\n\ny\n", "a.csv, row 4: got 1 values, expected 2, as in the header"),
        ("a.csv", b"text,text\nx,y\n", "a.csv, row 1: got column 'text' twice in the header"),
        ("a.csv", b'text\n"x\n', "a.csv, row 2: got a line that is not CSV (unexpected end of data"),
        ("a.csv", b"text\n\xff\n", "a.csv, after row .*: got bytes that are not UTF-8 (invalid start byte)"),
        ("a.txt", b"x\n\xff\n", "a.txt, row 2: got bytes that are not UTF-8 (invalid start byte)"),
        ("a.parquet", b"PAR", "a.parquet: got no Parquet ("),
        ("a.parquet", b"", "a.parquet: got no Parquet ("),
        (
            "a.xlsx",
            b"x",
            "a.xlsx: got a .xlsx, expected a file ending in .jsonl, .json, .parquet, .csv, .txt; all but "
            ".parquet may be comp",
        ),
        ("a.jsonl.zip", b"x", "a.jsonl.zip: got a .jsonl.zip, expected a file ending in"),
        ("a.parquet.gz", b"x", "a.parquet.gz: got a .parquet.gz, expected a file ending in"),
        ("data", b"x", "data: got a file without ending, expected a file ending in"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    with pytest.raises(DataError, match=re.sub(r"([()])", r"\\\1", message)) as refused:
        load_rows(write_bytes(tmp_path / name, content))
    assert str(refused.value).startswith(str(tmp_path / name)) and "\n" not in str(refused.value)


# CSV and text


@pytest.mark.parametrize("compress", [None, gzip.open, bz2.open, lzma.open])
def test_csv_values_are_text_but_for_labels_and_margins(
    tmp_path: Path, compress: Callable[..., Any] | None
) -> None:
    suffix = {None: "", gzip.open: ".gz", bz2.open: ".bz2", lzma.open: ".xz"}[compress]
    values = [
        "4",
        "3.10",
        "false",
        "NA",
        "",
        "null",
        "a,b",
        '"q"',
        "two\r\nlines",
        "a\nb",
        "x" * 200_000,
        " é世 ",
    ]
    with (compress or open)(tmp_path / f"a.csv{suffix}", "wt", encoding="utf-8-sig", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "label", "margin"])
        for number, value in enumerate(values):
            table.writerow(
                [value, ["true", "False", "TRUE", "2"][number % 4], ["1e-11", "-3", "", "x"][number % 4]]
            )
    rows = load_rows(str(tmp_path / f"a.csv{suffix}"))
    assert rows["text"] == values
    assert same(rows["label"][:4], [True, False, True, "2"]) and same(
        rows["margin"][:4], [1e-11, -3.0, "", "x"]
    )
    assert [rows.place(index)[1] for index in (0, 8, 9, 10)] == [
        2,
        10,
        12,
        14,
    ]  # the line where a record begins


def test_text_is_one_document_a_line(tmp_path: Path) -> None:
    rows = load_rows(write_bytes(tmp_path / "a.txt", '\ufeff4\r\n\r\n "x" \u2028y\n \n[1]'.encode()))
    assert list(rows) == [{"text": "4"}, {"text": ' "x" \u2028y'}, {"text": "[1]"}]
    assert [rows.place(index)[1] for index in range(3)] == [1, 3, 5]
