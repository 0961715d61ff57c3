"""The results file of a GPU check: written after each row, so that half a run leaves half a file.

It has the form of `python -m bench`'s: `machine_info`, `peers` and `cases`, which bench.reports reads. The
parts of a check are in `checks`. Two calls of a check share one file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastalign.measure import machine

from ..core.peers import found

SAME = ("gpu", "torch", "triton")  # of machine_info; two calls that share a file must agree in them


class Results:
    """The results file at `path`; it continues a file of the same card and versions.

    Raises:
        ValueError: the file is of another card or other versions.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        now = machine()
        self._content: dict[str, Any] = {"machine_info": now, "peers": found(), "cases": [], "checks": []}
        if path.exists():
            self._content = json.loads(path.read_text())
            before = self._content["machine_info"]
            for key in SAME:
                if before.get(key) != now[key]:
                    raise ValueError(
                        f"{path}: got results of {key} {before.get(key)}, expected {now[key]}; "
                        "name another file with --output"
                    )

    def add(self, kind: str, entry: Mapping[str, Any]) -> None:
        """Add an entry to "cases" or "checks" in place of one of the same name, and write the file.

        A part of a check may have written to the file since, so it is read again.
        """
        if self.path.exists():
            self._content = json.loads(self.path.read_text())
        entries = self._content[kind]
        self._content[kind] = [old for old in entries if old["name"] != entry["name"]] + [dict(entry)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_name(f"{self.path.name}.new")
        new.write_text(json.dumps(self._content, indent=1))
        os.replace(new, self.path)
