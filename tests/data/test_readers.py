"""Readers: what is written comes through unchanged, or is refused with file and row."""

import bz2
import csv
import gzip
import json
import lzma
import random
import shutil
import string
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from fastalign.chat import DataError
from fastalign.readers import load_rows
from fastalign.rows import Rows, as_rows, read_each

TALK = [
    {"role": "user", "content": "What did you think of the film?"},
    {"role": "assistant", "content": "It was great.\n"},
]


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def write(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_bytes(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def parquet(path: Path, table: pa.Table | Mapping[str, Any], **options: Any) -> str:
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), path, **options)
    return str(path)


def same(left: Any, right: Any) -> bool:
    """Equality of values and of their types: 1 is not 1.0 and not True."""
    return repr(left) == repr(right)


# JSON


ODD = [
    "",
    "5",
    "null",
    "[1]",
    "4",
    "3.10",
    "false",
    "NaN",
    "1e5",
    '{"a": 1}',
    "\u2028",
    "é世😀",
    "\x7f\x00\t",
    " x\r\n",
    "-0",
]


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
        generator.choice(ODD + ["a", "b", "c"]): random_value(generator, depth - 1)
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
            "a.jsonl, row 3: not JSON: Expecting value at column 10",
        ),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": "y',
            "a.jsonl, row 2: not JSON: Unterminated string starting at at column 10",
        ),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xc3', "a.jsonl, row 2: not UTF-8: unexpected end of data"),
        ("a.jsonl", b'{"text": "x"}\n["x"]\n', "a.jsonl, row 2: must be a JSON object, got list"),
        ("a.jsonl", b'{"text": "x"} {"text": "y"}\n', "a.jsonl, row 1: not JSON: Extra data at column 15"),
        ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl, row 1: not UTF-8: invalid start byte"),
        (
            "a.jsonl",
            b'{"text": "\\ud83d\\ude00"}\n{"text": "\\ud83d"}\n',
            "a.jsonl, row 2: not Unicode: surrogates not allowed",
        ),
        ("a.jsonl", b'{"x": 1}\n{"x": 1, "x": 2}\n', "a.jsonl, row 2: key 'x' comes twice in one object"),
        (
            "a.jsonl",
            b'{"x": [{"y": 1, "z": 1, "y": 1}]}\n',
            "a.jsonl, row 1: key 'y' comes twice in one object",
        ),
        ("a.jsonl", b'{"x": NaN}\n', "a.jsonl, row 1: NaN is not JSON: write null"),
        ("a.jsonl", b'{"x": [-Infinity]}\n', "a.jsonl, row 1: -Infinity is not JSON: write null"),
        ("a.jsonl", b'{"x": 1e400}\n', "a.jsonl, row 1: number 1e400 is beyond the range of doubles"),
        ("a.jsonl", b'{"x": -0.5e-400}\n', "a.jsonl, row 1: number -0.5e-400 is beyond the range of doubles"),
        (
            "a.jsonl",
            b'{"x": ' + b"9" * 5000 + b"}\n",
            "a.jsonl, row 1: a whole number has too many digits; Python reads 4300",
        ),
        ("a.jsonl", b'{"x": 1}\n' + DEEP, "a.jsonl, row 2: nested deeper than 200 levels"),
        (
            "a.jsonl",
            b'{"x": 1}\n' + DEEP.replace(b"[" * 700, b"").replace(b"]" * 700, b""),
            "row 2: nested deeper than 200 levels",
        ),
        ("a.json", b'[{"x": 1},\n' + DEEP + b"]", "a.json, row 2: nested deeper than 200 levels"),
        ("a.json", b'[{"x": 1}, {"x": NaN}]', "a.json, row 2: NaN is not JSON: write null"),
        ("a.json", b'[{"text": "x"}, 3]', "a.json, row 2: must be a JSON object, got int"),
        ("a.json", b'[{"text": "x"},\n', "a.json, line 2: not JSON: Expecting value at column 1"),
        (
            "a.json",
            b'[{"text": "x"}\n{"text": "y"}]',
            "a.json, line 2: not JSON: Expecting ',' delimiter at column 1",
        ),
        ("a.json", b'[{"text": "x"}]\n[]', "a.json, line 2: not JSON: Extra data at column 1"),
        ("a.json", b'[{"text": "x"}]]', "a.json, line 1: not JSON: Extra data at column 16"),
        ("a.json", b'[{"text": "x"},\n{"text": "\xff"}]', "a.json, line 2: not UTF-8: invalid start byte"),
        (
            "a.json.gz",
            gzip.compress(b'[{"x": 1}' + b" " * 20_000)[:-9],
            "a.json.gz: cannot be read: Compressed file ended before",
        ),
        ("a.json", b'{\n "data": []\n}', "a .json file must be an array of objects, or have one a line"),
        ("a.jsonl", b"", "a.jsonl: no rows"),
        ("a.jsonl", b"\xef\xbb\xbf\n", "a.jsonl: no rows"),
        ("a.json", b"[ ]", "a.json: no rows"),
        ("a.csv", b"", "a.csv: no rows"),
        ("a.csv", b"text\n", "a.csv: no rows"),
        ("a.txt", b"\n \n", "a.txt: no rows"),
        ("a.jsonl", '{"x": 1}'.encode("utf-16"), "a.jsonl: is UTF-16 text: save it as UTF-8"),
        ("a.jsonl", gzip.compress(b'{"x": 1}'), "a.jsonl: is compressed by gzip: name it .gz"),
        ("a.jsonl.gz", b'{"x": 1}\n', "a.jsonl.gz, after row 0: cannot be read: Not a gzipped file"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"x": 1}\n' * 50)[:-9],
            "a.jsonl.gz, after row .*: cannot be read: Compressed file ended before",
        ),
        (
            "a.csv.bz2",
            bz2.compress(b"text\nx\n")[:-9],
            "a.csv.bz2, after row .*: cannot be read: Compressed file ended before",
        ),
        ("a.csv", b"text,label\nx,true\n\ny\n", "a.csv, row 4: got 1 values, expected 2, as in the header"),
        ("a.csv", b"text,text\nx,y\n", "a.csv, row 1: column 'text' comes twice in the header"),
        ("a.csv", b'text\n"x\n', "a.csv, row 2: not CSV: unexpected end of data"),
        ("a.csv", b"text\n\xff\n", "a.csv, after row .*: not UTF-8: invalid start byte"),
        ("a.txt", b"x\n\xff\n", "a.txt, row 2: not UTF-8: invalid start byte"),
        ("a.parquet", b"PAR", "a.parquet: not Parquet: "),
        ("a.parquet", b"", "a.parquet: not Parquet: "),
        (
            "a.xlsx",
            b"x",
            "a.xlsx: got a .xlsx, expected a file ending in .jsonl, .json, .parquet, .csv, .txt; all but .parquet may be comp",
        ),
        ("a.jsonl.zip", b"x", "a.jsonl.zip: got a .jsonl.zip, expected a file ending in"),
        ("a.parquet.gz", b"x", "a.parquet.gz: got a .parquet.gz, expected a file ending in"),
        ("data", b"x", "data: got a file without ending, expected a file ending in"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message) as refused:
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


# Parquet


def test_reads_jsonl_json_and_parquet_alike(tmp_path: Path) -> None:
    rows = [{"messages": TALK, "n": 1}, {"messages": TALK[:1], "n": 2}, {"n": 3}]
    write(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    parquet(tmp_path / "p1.parquet", pa.Table.from_pylist(rows[:1]))
    parquet(tmp_path / "p2.parquet", pa.Table.from_pylist(rows[1:]))
    for source in ("a.jsonl", "a.json", "p*.parquet", "*.jsonl"):
        read = load_rows(str(tmp_path / source))
        assert read["n"] == [1, 2, 3]
        assert read["messages"] == [TALK, TALK[:1], None]


def test_fields_of_parquet_structs_that_are_null_are_absent_at_any_depth(tmp_path: Path) -> None:
    schemas = [
        {"name": "f", "parameters": {"type": "object", "properties": {name: {"type": "string"}}}}
        for name in ("city", "day")
    ]
    calls = [
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {name: "x"}}}]}
        for name in ("city", "day")
    ]
    written = [
        {"messages": [*TALK, calls[0]], "tools": schemas[:1], "n": None},
        {"messages": [calls[1]], "tools": [schemas[1]], "n": 1},
    ]
    written.append({"messages": [TALK[0]], "tools": None, "n": 2})
    table = pa.Table.from_pylist(written)
    assert (
        "city" in table["tools"].to_pylist()[1][0]["parameters"]["properties"]
    )  # Arrow gives all structs the same keys
    assert same(list(load_rows(parquet(tmp_path / "a.parquet", table))), written)
    assert same(list(as_rows(Dataset(table))), written)
    for kind in (
        pa.large_list(table.schema.field("messages").type.value_type),
        pa.list_view(table.schema.field("messages").type.value_type),
    ):
        assert same(
            list(load_rows(parquet(tmp_path / "b.parquet", {"m": pa.array([TALK, [calls[0]]], kind)})))[1],
            {"m": [calls[0]]},
        )
    assert load_rows(write(tmp_path / "a.jsonl", [{"m": [{"role": None}]}]))[0] == {
        "m": [{"role": None}]
    }  # a genuine null


def test_parquet_maps_become_dicts_and_keep_their_nulls(tmp_path: Path) -> None:
    kind = pa.map_(pa.string(), pa.struct([("a", pa.int64()), ("b", pa.string())]))
    rows = load_rows(
        parquet(tmp_path / "a.parquet", {"m": pa.array([[("x", {"a": 1}), ("y", None)], None, []], kind)})
    )
    assert rows["m"] == [{"x": {"a": 1}, "y": None}, None, {}]
    twice = parquet(
        tmp_path / "b.parquet",
        {"n": [1, 2], "m": pa.array([[], [("k", 1), ("k", 2)]], pa.map_(pa.string(), pa.int64()))},
    )
    assert load_rows(twice)["n"] == [1, 2]
    with pytest.raises(
        DataError, match=r"b.parquet, row 2: column 'm' cannot be read: .*duplicate key was 'k'"
    ):
        list(load_rows(twice))


def test_parquet_shards_may_differ_in_types_and_columns(tmp_path: Path) -> None:
    message = {"role": "user", "content": "x"}
    shards = [
        pa.table(
            {
                "text": pa.array(["a"]),
                "n": pa.array([1], pa.int32()),
                "m": [[message]],
                "l": [[1]],
                "k": [{"a": 1}],
                "extra": ["x"],
            }
        ),
        pa.table(
            {
                "text": pa.array(["b"], pa.large_string()),
                "n": [2**40],
                "m": [[message | {"name": "y"}]],
                "l": [[]],
                "k": [{"b": 2}],
            }
        ),
        pa.table(
            {
                "text": pa.array(["c"]).dictionary_encode(),
                "n": pa.nulls(1),
                "m": pa.nulls(1),
                "l": [["x"]],
                "k": ["text"],
            }
        ),
    ]
    for number, shard in enumerate(shards):
        parquet(tmp_path / f"{number}.parquet", shard)
    rows = load_rows(str(tmp_path / "*.parquet"))
    assert rows["text"] == ["a", "b", "c"] and rows["n"] == [1, 2**40, None]
    assert rows["m"] == [[message], [message | {"name": "y"}], None]
    assert (
        rows["l"] == [[1], [], ["x"]]
        and rows["k"] == [{"a": 1}, {"b": 2}, "text"]
        and rows["extra"] == ["x", None, None]
    )


def test_damaged_parquet_names_file_and_rows(tmp_path: Path) -> None:
    table = {"n": list(range(4000)), "text": [f"{number} {'x' * 50}" for number in range(4000)]}
    path = Path(
        parquet(
            tmp_path / "a.parquet",
            table,
            row_group_size=1000,
            compression="zstd",
            write_page_checksum=True,
            use_dictionary=False,
        )
    )
    place = pq.ParquetFile(path).metadata.row_group(2).column(1)
    content = bytearray(path.read_bytes())
    content[place.data_page_offset + place.total_compressed_size - 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a.parquet, rows 2001 to 3000: damaged: .*") as refused:
        load_rows(str(path))
    assert "\n" not in str(refused.value)


def test_bad_utf8_in_parquet_names_file_row_and_column(tmp_path: Path) -> None:
    data = pa.array([b"x"] * 1500 + [b"\xff"] + [b"y"], pa.binary()).view(pa.string())
    rows = load_rows(parquet(tmp_path / "a.parquet", {"text": data, "n": range(1502)}))
    for read in (
        lambda: rows["text"],
        lambda: list(rows),
        lambda: read_each(rows, ["text"], lambda row: row["text"]),
    ):
        with pytest.raises(
            DataError,
            match=r"^\S+a.parquet, row 1501: column 'text' cannot be read: not UTF-8: invalid start byte$",
        ):
            read()
    assert rows["n"] == list(range(1502))  # nobody reads the other column


# Which files


def test_missing_files_are_told_with_close_names(tmp_path: Path) -> None:
    write(tmp_path / "chats.jsonl.gz", [])
    with pytest.raises(DataError, match=r"chats.jsonl: no such file; did you mean .*/chats.jsonl.gz\?$"):
        load_rows(str(tmp_path / "chats.jsonl"))
    for name, message in (
        ("x.parquet", "no such file$"),
        ("*.parquet", "no such file; the pattern matches none"),
        ("folder/", "no such file"),
    ):
        with pytest.raises(DataError, match=message):
            load_rows(str(tmp_path / name))
    with pytest.raises(ValueError, match=r"split must be 'train' for files.*'test'"):
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
    with pytest.raises(DataError, match="set: no split 'dev'; there are: train, test$"):
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
    Dataset.from_dict({"text": ["x"]}).save_to_disk(folder)
    assert load_rows(str(folder))["text"] == ["x"]


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
        match=rf"^{source}: no such file or folder; no data set.*its hub cannot be reached: .*not known$",
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
        DataError, match="^org/other_set: `datasets` cannot load it: Unknown split .dev.. Should be one of"
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
    others = [rows[::-1], rows[:1], [rows[0], {"text": "b", "n": 3}], [rows[0], {"text": "c", "n": 2}]]
    for other in others:
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
