"""Tokens of one row: what the tokenizers make, and what every later step works on."""

from typing import NamedTuple

from .rows import Row

IGNORE_INDEX = -100


class Tokenized(NamedTuple):
    """One sequence of tokens."""

    input_ids: list[int]
    trained: list[bool]
    """Whether a token is a target that is trained on. Position 0 never is: nothing predicts it."""


class Prompt(NamedTuple):
    """What a completion follows."""

    input_ids: list[int]
    row: Row = {}
    """The columns of its row: `prompt`, as text or messages, and all further columns."""


def last_token(sequence: Tokenized, *, pad_id: int) -> int:
    """Index of a sequence's last token other than `pad_id`; 0 if there is none.

    transformers' classifiers read their score there.
    """
    return max((place for place, token in enumerate(sequence.input_ids) if token != pad_id), default=0)
