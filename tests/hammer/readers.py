"""Cases of the readers: a whole file is read as it was written; a damaged one is read, or refused in one line
that names it."""

import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import random
import string
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastalign.data import DataError, load_rows
from tests.data.files import ODD, same

HOSTILE = (
    *(
        b"\x00",
        b"\xff",
        b"\xc3",
        b"\xed\xa0\x80",
        b"\n",
        b"\r",
        b'"',
        b"\\",
        b"\\u",
        b"\\ud800",
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
    ),
    *(
        b"NaN",
        b"-Infinity",
        b"1e999999",
        b"-",
        b"9" * 5000,
        b"[" * 3000,
        b'{"a":' * 2000,
        b"PAR1",
        b"\x1f\x8b",
        b"BZh9",
        b"\xef\xbb\xbf",
    ),
)
COLUMNS = ("a", "prompt", "label", "margin", "__row__", "é")


def value(r: random.Random, depth: int) -> Any:
    kind = r.randrange(9 if depth else 7)
    if kind < 2:
        return (
            r.choice(ODD)
            if kind
            else "".join(r.choice(string.printable + "äß世😀") for _ in range(r.randrange(12)))
        )
    if kind == 2:
        return r.randint(-(10 ** r.randrange(1, 40)), 10 ** r.randrange(1, 40))
    if kind < 5:
        return r.uniform(-1, 1) * 10.0 ** r.choice((0, r.randint(-300, 300)))
    if kind < 7:
        return r.choice((None, True, False))
    inner = [value(r, depth - 1) for _ in range(r.randrange(4))]
    return inner if kind == 7 else {r.choice(ODD): item for item in inner}


def json_file(r: random.Random, *, array: bool) -> tuple[bytes, list[dict[str, Any]]]:
    rows = [{name: value(r, 3) for name in COLUMNS if r.random() < 0.7} for _ in range(r.randint(1, 30))]
    escaped = r.random() < 0.5
    if array:
        text = json.dumps(rows, ensure_ascii=escaped, indent=r.choice((None, 1)))
    else:
        end = r.choice(("\n", "\r\n", "\n\n"))
        text = end.join(json.dumps(row, ensure_ascii=escaped) for row in rows) + r.choice(("", end))
    return r.choice((b"", b"", b"\xef\xbb\xbf")) + text.encode(), rows


def csv_file(r: random.Random) -> tuple[bytes, list[dict[str, Any]]]:
    rows = [
        {name: str(value(r, 0) or "x").replace("\x00", "0") for name in ("a", "prompt", "é")}
        for _ in range(r.randint(1, 30))
    ]
    file = io.StringIO(newline="")
    writer = csv.DictWriter(
        file, fieldnames=["a", "prompt", "é"], lineterminator=r.choice(("\n", "\r\n")), quoting=csv.QUOTE_ALL
    )
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode(), rows


def text_file(r: random.Random) -> tuple[bytes, list[dict[str, Any]]]:
    texts = [
        " ".join(r.choices(["film", "é世😀", "5", "null", '"'], k=r.randint(1, 9)))
        for _ in range(r.randint(1, 30))
    ]
    return "\n".join(texts).encode() + r.choice((b"", b"\n")), [{"text": text} for text in texts]


def parquet_file(r: random.Random) -> tuple[bytes, list[dict[str, Any]]]:
    count = r.randint(1, 200)
    columns: dict[str, Any] = {
        "prompt": ["".join(r.choices(string.printable + "é世", k=r.randrange(9))) for _ in range(count)]
    }
    columns["__row__"] = [r.randint(-(2**63), 2**63 - 1) for _ in range(count)]
    columns["margin"] = [r.choice((None, r.random())) for _ in range(count)]
    columns["messages"] = [
        [{"role": "user", "content": r.choice(ODD)}] * r.randrange(3) for _ in range(count)
    ]
    sink = io.BytesIO()
    options: dict[str, Any] = {
        "compression": r.choice(("snappy", "zstd", "gzip", "none")),
        "row_group_size": r.choice((7, 1000)),
    }
    options |= {"use_dictionary": r.random() < 0.5, "write_page_checksum": r.random() < 0.5}
    pq.write_table(pa.table(columns), sink, **options)
    return sink.getvalue(), [dict(zip(columns, row)) for row in zip(*columns.values())]


FILES: dict[str, Callable[[random.Random], tuple[bytes, list[dict[str, Any]]]]] = {
    ".jsonl": lambda r: json_file(r, array=False),
    ".json": lambda r: json_file(r, array=r.random() < 0.7),
    ".csv": csv_file,
    ".txt": text_file,
    ".parquet": parquet_file,
}


def zst(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zst,
}


def damage(r: random.Random, content: bytes) -> bytes:
    """A few bytes flipped, cut out, put in, doubled or moved."""
    data = bytearray(content)
    for _ in range(r.choice((1, 1, 2, 5))):
        place = r.randrange(len(data) + 1)
        end = min(len(data), place + r.choice((1, 2, 8, 100, 5000)))
        kind = r.randrange(6)
        if kind == 0 and data:
            data[place % len(data)] ^= 1 << r.randrange(8)
        elif kind == 1:
            del data[place:end]
        elif kind == 2:
            data[place:place] = r.choice(HOSTILE)
        elif kind == 3:
            data[place:place] = data[place:end]
        elif kind == 4:
            data[place:end] = r.randbytes(end - place)
        else:
            del data[place:]
    return bytes(data)


def read(path: Path) -> list[dict[str, Any]]:
    """All rows. Raises AssertionError where the file is refused in another way than by one line that names
    it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return list(load_rows(str(path)))
        except DataError as error:
            said = str(error)
            assert said.startswith(str(path)) and "\n" not in said and len(said) < 1000, (
                f"refused as {said!r}"
            )
            raise


def fuzz(r: random.Random) -> str:
    """One case; its name."""
    ending = r.choice(list(FILES))
    content, rows = FILES[ending](r)
    packed = r.choice(list(COMPRESSIONS)) if ending != ".parquet" and r.random() < 0.4 else ""
    whole = r.random() < 0.25
    broken_inside = not whole and r.random() < 0.5
    if broken_inside:
        content = damage(r, content)
    if packed:
        content = COMPRESSIONS[packed](content)
    if not whole and not broken_inside:
        content = damage(r, content)
    with tempfile.TemporaryDirectory(prefix="fastalign-readers-") as folder:
        path = Path(folder, f"rows{ending}{packed}")
        path.write_bytes(content)
        if whole:
            found = read(path)
            names = list(dict.fromkeys(name for row in rows for name in row))
            assert all(
                same(seen, {name: row.get(name) for name in seen}) and set(seen) == set(names)
                for seen, row in zip(found, rows, strict=True)
            )
            return f"{ending}, whole"
        with contextlib.suppress(DataError):
            read(path)
    return f"{ending}, damaged"
