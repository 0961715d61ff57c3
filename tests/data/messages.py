"""Messages, templates and short calls for the tests of chats."""

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from fastalign.data import Rows, Tokenized, load_rows, tokenize_sft
from tests.data.chats import build

ASKED = {"role": "user", "content": "What is it?"}


GOOD = {"role": "assistant", "content": "Great."}


BAD = {"role": "assistant", "content": "Bad."}


TALK = [ASKED, GOOD]


def rows_of(folder: Path, *rows: Any) -> Rows:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_rows(str(folder / "a.jsonl"))


def sft_text(folder: Path, template: Any, *rows: Any) -> list[str]:
    """What is trained and what is not, with | where one ends."""
    tokenizer = build(template)
    return [
        shown(tokenizer, sequence)
        for sequence in tokenize_sft(rows_of(folder, *rows), tokenizer, max_length=512)
    ]


def shown(tokenizer: Any, sequence: Tokenized) -> str:
    runs = groupby(zip(*sequence, strict=True), key=lambda token: token[1])
    return "|".join(str(tokenizer.decode([token for token, _ in run])) for _, run in runs)


def chatml(*messages: Any, tools: str = "") -> str:
    """The text in which all that the assistant says is trained."""
    parts = [
        f"<|im_start|>{role}\n" + (f"|{said}<|im_end|>|\n" if role == "assistant" else f"{said}<|im_end|>\n")
        for role, said in messages
    ]
    return tools + "".join(parts)
