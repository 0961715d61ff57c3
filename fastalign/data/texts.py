"""Plain text of rows, and which tokens lie in a trained span of characters."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from .errors import DataError
from .rows import Row

Spans = list[tuple[int, int]]  # characters [start, end) of a text that are trained, ascending


def join_texts(row: Row, answer: str = "completion") -> tuple[str, Spans]:
    """`prompt` and the column `answer` as one text, and the span of the answer.

    They are tokenized as one text, because SentencePiece tokenizers put a space in front of each text: an
    answer alone would get one. A prompt may be white space, such as a line break. An answer may not.
    """
    prompt = read_text("prompt", row["prompt"], blank=True)
    text = prompt + read_text(answer, row[answer])
    return text, [(len(prompt), len(text))]


def overlapping(offsets: Sequence[tuple[int, int]], spans: Spans) -> list[bool]:
    """Whether each token, by its characters [start, end), overlaps a span; the first token never counts.

    Some tokenizers trim white space from offsets. A token of white space only is then empty, at its end: it
    begins where the token before it ended. Special tokens that the tokenizer adds are at (0, 0) and not
    trained.
    """
    trained = []
    place = previous = 0
    for start, end in offsets:
        start = min(start, previous) if start == end else start
        while place < len(spans) and spans[place][1] <= start:
            place += 1
        trained.append(place < len(spans) and spans[place][0] < end and start < end)
        previous = end
    return [False, *trained[1:]] if trained else []


def read_text(column: str, text: Any, *, blank: bool = False) -> str:
    """`text`. Raises DataError if it is no text or empty; white space counts as empty unless `blank`."""
    if text is None:
        raise DataError(f"column {column!r}: got null or no such column, expected text")
    if not isinstance(text, str):
        raise DataError(f"column {column!r}: got {type(text).__name__}, expected text")
    if not (text if blank else text.strip()):
        raise DataError(f"column {column!r}: got an empty text, expected one that is not")
    return text


def tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """The name of a tokenizer in messages: where it was loaded from, or else its class."""
    return tokenizer.name_or_path or type(tokenizer).__name__
