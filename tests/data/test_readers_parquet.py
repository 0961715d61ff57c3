"""Parquet: structs, maps, shards that differ, and damage that is named with file and row."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from fastalign.data import DataError, load_rows
from fastalign.data.rows import as_rows, read_each
from tests.data.files import parquet, same, write

TALK = [
    {"role": "user", "content": "What did you think of the film?"},
    {"role": "assistant", "content": "It was great.\n"},
]


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
        DataError,
        match=r"b.parquet, row 2: column 'm': got a value that cannot be read .*duplicate key was 'k'",
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
    with pytest.raises(DataError, match=r"a.parquet, rows 2001 to 3000: got damaged rows .*") as refused:
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
            match=r"^\S+a.parquet, row 1501: column 'text': got a value that cannot be read \(not UTF-8",
        ):
            read()
    assert rows["n"] == list(range(1502))  # nobody reads the other column
