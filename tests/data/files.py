"""Files that the readers' tests write, and equality that tells NaN and types apart."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

# Texts that a reader may take for something else.
ODD = (
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
    "\ufeff",
)


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
