"""Rows of preferences become tokens: pairs for reward models and DPO, judged completions for KTO.

Only the completion is scored, with its EOS or end-of-turn token: `Tokenized.trained` marks it.
sequence_batches.py puts the sequences that a step compares into one forward pass.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .errors import DataError
from .rows import Row, Rows, need_columns, read_each, refuse_rows
from .sequence_batches import Batch
from .tokenization import BESIDE, TooLong, answer_converter, holds_messages, tokenize_answers
from .tokens import Tokenized


class Pair(NamedTuple):
    """Two completions of one prompt, each after the prompt."""

    chosen: Tokenized
    rejected: Tokenized
    margin: float | None = None
    """How much better the chosen one is, in units of the reward."""


class Unpaired(NamedTuple):
    """A completion that is desirable or not, after its prompt."""

    answered: Tokenized
    desirable: bool
    mismatched: Tokenized | None = None
    """The prompt followed by another row's completion; see `mismatch`."""

    @property
    def prompt(self) -> list[int]:
        """The tokens before the first scored one."""
        return self.answered.input_ids[: self.answered.trained.index(True)]

    @property
    def completion(self) -> tuple[int, ...]:
        """The tokens from the first scored one on."""
        return tuple(self.answered.input_ids[self.answered.trained.index(True) :])


def tokenize_pairs(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, *, max_length: int, too_long: TooLong = "drop"
) -> list[Pair]:
    """Pairs, one per row: `prompt`, `chosen` and `rejected`, and a number `margin` if there is one.

    The three are all text, or all messages.

    Messages may come without `prompt`: the prompt is then what both conversations begin with. Both answers
    may repeat a prompt of messages. Both may be whole conversations beside a prompt of text, which must be
    the last user turn that they share. Text is ended by an EOS. A `tools` column goes to the chat template.

    `too_long` says what happens to pairs with a sequence longer than `max_length` tokens: they are refused,
    dropped, or truncated at the right. One warning counts those that were dropped or truncated.

    Raises:
        DataError: a column is missing or has the wrong type; a completion is empty or has no token within
            `max_length`; or both completions are the same, in full or within `max_length`.
        ValueError: the tokenizer lacks what this needs.
    """
    implicit = (
        "prompt" not in rows.column_names and "chosen" in rows.column_names and holds_messages(rows, "chosen")
    )
    need_columns(rows, *([] if implicit else ["prompt"]), "chosen", "rejected")
    chat = implicit or holds_messages(rows, "prompt", "chosen")
    convert = answer_converter(tokenizer, "chosen", "rejected", chat=chat)

    def both(row: Row) -> list[Any]:
        if implicit and not (isinstance(row["chosen"], list) and isinstance(row["rejected"], list)):
            raise DataError(
                "columns 'chosen' and 'rejected': got a text, expected lists of messages where there is no "
                "column 'prompt'"
            )
        if row["chosen"] == row["rejected"]:
            raise DataError("columns 'chosen' and 'rejected': got the same answer, expected different ones")
        return convert(row)

    margins: Sequence[float | None] = [None] * len(rows)
    if "margin" in rows.column_names:
        margins = read_each(rows, ["margin"], _read_margin)
    answers = read_each(
        rows, ["chosen", "rejected"] if implicit else ["prompt", "chosen", "rejected"], both, BESIDE
    )
    tokenized = tokenize_answers(
        rows, answers, tokenizer, chat=chat, max_length=max_length, too_long=too_long
    )
    same = [index for index, pair in enumerate(tokenized) if pair and pair[0] == pair[1]]
    refuse_rows(rows, {f"columns 'chosen' and 'rejected' are the same within max_length={max_length}": same})
    return [Pair(pair[0], pair[1], margin) for pair, margin in zip(tokenized, margins, strict=True) if pair]


def tokenize_unpaired(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, *, max_length: int, too_long: TooLong = "drop"
) -> list[Unpaired]:
    """Judged completions, one per row: `prompt`, `completion` and `label`, true if desirable.

    Prompt and completion are both text, or both messages.

    Texts, lengths and errors are as in `tokenize_pairs`. A label other than true or false is refused.
    """
    need_columns(rows, "prompt", "completion", "label")
    chat = holds_messages(rows, "prompt", "completion")
    labels = read_each(rows, ["label"], _read_label)
    answers = read_each(
        rows, ["prompt", "completion"], answer_converter(tokenizer, "completion", chat=chat), BESIDE
    )
    tokenized = tokenize_answers(
        rows, answers, tokenizer, chat=chat, max_length=max_length, too_long=too_long
    )
    return [
        Unpaired(sequences[0], label) for sequences, label in zip(tokenized, labels, strict=True) if sequences
    ]


def mismatch(rows: Sequence[Unpaired], *, seed: int, step: int, max_length: int) -> list[Unpaired]:
    """The rows of a step, each with its prompt followed by another row's completion.

    This sequence is cut at `max_length` tokens.

    No row meets a completion equal to its own. Each completion is met once, where no completion is that of
    more than half of the rows. The result is a function of the arguments. Raises ValueError where all
    completions are equal.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for number in np.random.default_rng((seed, step)).permutation(len(rows)):
        groups.setdefault(rows[number].completion, []).append(int(number))
    if len(groups) < 2:
        raise ValueError(
            f"rows: got {len(rows)} with the same completion, expected at least two different ones, because "
            "each prompt meets another row's"
        )
    # Equal completions lie side by side in a ring. Each place meets the one `shift` places further: past
    # the end of its own group, whatever the group, but before its beginning, which the modulo ensures for a
    # majority.
    ring = [number for group in groups.values() for number in group]
    shift = max(map(len, groups.values()))
    met: dict[int, int] = {}
    first = 0
    for group in groups.values():
        outside = len(ring) - len(group)
        for place, number in enumerate(group):
            met[number] = ring[(first + len(group) + (place + shift - len(group)) % outside) % len(ring)]
        first += len(group)
    return [
        row._replace(mismatched=_join(row, rows[met[number]], max_length)) for number, row in enumerate(rows)
    ]


def mismatch_bounds(rows: Sequence[Unpaired], *, max_length: int) -> list[Tokenized]:
    """The shortest and the longest sequence that `mismatch` can make of any of the rows."""
    bounds = []
    for end in (min, max):
        prompt, completion = (
            end(rows, key=lambda row: len(row.prompt)),
            end(rows, key=lambda row: len(row.completion)),
        )
        bounds.append(_join(prompt, completion, max_length))
    return bounds


def sequences_of(pairs: Sequence[Pair]) -> list[list[Tokenized]]:
    """The chosen and the rejected sequence of each pair."""
    return [[pair.chosen, pair.rejected] for pair in pairs]


def collate_pairs(pairs: Sequence[Pair], *, packer: Callable[..., Batch]) -> Batch:
    """`both`: the chosen sequences followed by the rejected ones, packed. `margins`: fp32 [pairs], if any.

    `packer` is `pack_sequences` with its options.
    """
    sequences = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    batch = {"both": packer(sequences, [*range(len(pairs))] * 2)}
    margins = [pair.margin for pair in pairs if pair.margin is not None]
    return batch | ({"margins": torch.tensor(margins, dtype=torch.float32)} if margins else {})


def collate_unpaired(rows: Sequence[Unpaired], *, packer: Callable[..., Batch]) -> Batch:
    """`answered`, `mismatched` and `both` (one after the other), packed. `desirable`: bool [S].

    If there are no mismatched sequences, `both` holds the answered ones and `mismatched` is absent.
    `packer` is `pack_sequences` with its options.
    """
    answered = [row.answered for row in rows]
    mismatched = {number: row.mismatched for number, row in enumerate(rows) if row.mismatched is not None}
    batch: Batch = {
        "answered": packer(answered),
        "both": packer([*answered, *mismatched.values()], [*range(len(rows)), *mismatched]),
    }
    batch["desirable"] = torch.tensor([row.desirable for row in rows], dtype=torch.bool)
    return batch | ({"mismatched": packer([*mismatched.values()])} if mismatched else {})


def _join(row: Unpaired, other: Unpaired, max_length: int) -> Tokenized:
    prompt, sequence = row.prompt, other.answered
    first = sequence.trained.index(True)
    return Tokenized(
        (prompt + sequence.input_ids[first:])[:max_length],
        ([False] * len(prompt) + sequence.trained[first:])[:max_length],
    )


def _read_margin(row: Row) -> float:
    margin = row["margin"]
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        raise DataError(f"column 'margin': got {margin!r}, expected a finite number")
    return float(margin)


def _read_label(row: Row) -> bool:
    label = row["label"]
    if not isinstance(label, bool):
        raise DataError(f"column 'label': got {label!r}, expected true or false")
    return label
