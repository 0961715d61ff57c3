"""Rows of text or messages become tokens, and it is marked which tokens are trained.

Tokenization needs no model, so bad data is refused before a model is loaded. A DataError names the file,
the column and the rows, counted from 1 as an editor shows them.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from transformers import PreTrainedTokenizerBase

from .chat_template.messages import UNSERVED, refuse_beside_text
from .chat_template.trained_spans import WHOLE, ChatTemplate
from .errors import DataError
from .row_parts import BATCH
from .rows import Row, Rows, as_rows, name_rows, need_columns, read_each, refuse_rows
from .texts import Spans, join_texts, overlapping, read_text, tokenizer_name
from .tokens import Prompt, Tokenized

TooLong = Literal["refuse", "drop", "truncate"]
BESIDE = ("tools", *UNSERVED)  # columns that would change what the model sees


def tokenize_text(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    column: str = "text",
    too_long: Literal["split", "refuse", "drop", "truncate"] = "split",
) -> list[Tokenized]:
    """Documents for pre-training, each with the tokenizer's special tokens (BOS if it adds one) and one EOS.

    A document longer than `max_length` tokens is split into pieces that overlap by one token. So each token
    but the document's first is a target exactly once. With another `too_long`, the document is treated as
    in `tokenize_sft`.

    Raises DataError for a missing column, and for rows that are not text or are empty.
    """
    _check_max_length(max_length)
    eos = _eos_of(tokenizer)
    need_columns(rows, column)
    texts = read_each(rows, [column], lambda row: read_text(column, row[column]))
    pieces = []
    empty, long, doubled = [], [], []
    for index, (ids, _) in enumerate(_encode(tokenizer, texts)):
        if _has_two_bos(ids, tokenizer):
            doubled.append(index)
        if ids[-1:] != [eos]:
            ids.append(eos)
        if len(ids) < 2:
            empty.append(index)
        if len(ids) > max_length and too_long != "split":
            long.append(index)
            ids = ids[:max_length] if too_long == "truncate" else []
        for first in range(0, len(ids) - 1, max_length - 1):
            piece = ids[first : first + max_length]
            pieces.append(Tokenized(piece, [False] + [True] * (len(piece) - 1)))
    refuse_rows(rows, {f"column {column!r} has no tokens": empty})
    _warn_of_two_bos(rows, doubled, tokenizer)
    if too_long != "split":
        _report_long(rows, long, too_long, f"sequence_length={max_length}")
    return pieces


def tokenize_sft(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, *, max_length: int, too_long: TooLong = "drop"
) -> list[Tokenized]:
    """Demonstrations, one per row: `messages`, or `prompt` and `completion` (both text, or both messages).

    Of `messages`, each assistant turn is trained, with its end-of-turn token, unless its "weight" is 0. Of
    `prompt` and `completion`, only the completion is trained; text gets an EOS. If the chat template has {%
    generation %} marks, they say what belongs to a turn. Otherwise a turn is what it adds to the
    conversation before it with the generation prompt. A `tools` column goes to the template. ShareGPT's
    `conversations` are read as messages. A completion of messages may repeat its prompt. The prompt may
    then be the text of the user's last turn.

    `too_long` says what happens to rows longer than `max_length` tokens: they are refused, dropped, or
    truncated at the right. One warning counts those that were dropped or truncated.

    Raises:
        DataError: a column is missing or has the wrong type; a row has nothing to train on within
            `max_length`; the template would lose a part of a message; or the template rewrites earlier
            turns, so that the trained span is unknown.
        ValueError: the tokenizer lacks what this needs.
    """
    whole = [column for column in WHOLE if column in rows.column_names]
    if whole and "completion" in rows.column_names:
        raise DataError(
            f"{name_rows(rows)}columns: got both {whole[0]!r} and 'completion', expected one of them"
        )
    for column in ("prompt", *whole[1:]) if whole else ():
        if column in rows.column_names:
            warnings.warn(
                f"{name_rows(rows)}column {column!r} is not used beside {whole[0]!r}, which hold the whole "
                "conversation",
                stacklevel=2,
            )
    if not whole:
        need_columns(rows, "prompt", "completion")
    chat = bool(whole) or holds_messages(rows, "prompt", "completion")
    convert = answer_converter(tokenizer, *(whole[:1] or ["completion"]), chat=chat)
    answers = read_each(rows, whole[:1] or ["prompt", "completion"], convert, BESIDE)
    tokenized = tokenize_answers(
        rows, answers, tokenizer, chat=chat, max_length=max_length, too_long=too_long
    )
    return [sequences[0] for sequences in tokenized if sequences]


def tokenize_prompts(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, *, max_length: int, too_long: TooLong = "drop"
) -> list[Prompt]:
    """Prompts to complete, one per row: `prompt`, as text or as messages.

    The template adds the start of the assistant's turn to messages. Text gets the tokenizer's special
    tokens without an EOS at its end. `too_long` says what happens to prompts longer than `max_length`
    tokens: they are refused, dropped, or truncated at the left, because the completion depends on the
    prompt's end. One warning counts those that were dropped or truncated.

    Raises:
        DataError: the column is missing or has the wrong type; the messages end with the assistant's; a
            prompt has no tokens; or all prompts are dropped.
        ValueError: the tokenizer lacks what this needs.
    """
    need_columns(rows, "prompt")
    chat = holds_messages(rows, "prompt")
    convert = ChatTemplate(tokenizer).prompt if chat else _read_prompt
    texts = read_each(rows, ["prompt"], convert, BESIDE)
    prompts, empty, long, doubled = [], [], [], []
    encoded = _encode(tokenizer, texts, add_special_tokens=not chat)
    for index, ((ids, _), row) in enumerate(zip(encoded, as_rows(rows).read(), strict=True)):
        if not chat and _has_two_bos(ids, tokenizer):
            doubled.append(index)
        if not chat and ids[-1:] == [tokenizer.eos_token_id] and len(ids) > 1:
            ids.pop()
        if not ids:
            empty.append(index)
        if len(ids) > max_length:
            long.append(index)
        if len(ids) <= max_length or too_long == "truncate":
            prompts.append(Prompt(ids[-max_length:], row))
    refuse_rows(rows, {"column 'prompt' has no tokens": empty})
    _warn_of_two_bos(rows, doubled, tokenizer)
    _report_long(rows, long, too_long, f"max_prompt_length={max_length}", side="left")
    return prompts


def answer_converter(
    tokenizer: PreTrainedTokenizerBase, *columns: str, chat: bool
) -> Callable[[Row], list[tuple[str, Spans]]]:
    """A function from a row to (text, trained spans) of its prompt followed by each of the columns.

    The chat template writes the text if `chat`; otherwise prompt and column are joined.
    """
    if chat:
        template = ChatTemplate(tokenizer)
        return lambda row: template.render(row, *columns)

    def convert(row: Row) -> list[tuple[str, Spans]]:
        refuse_beside_text(row)
        return [join_texts(row, column) for column in columns]

    return convert


def tokenize_answers(
    rows: Rows,
    answers: Sequence[Sequence[tuple[str, Spans]]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat: bool,
    max_length: int,
    too_long: TooLong = "drop",
) -> list[list[Tokenized]]:
    """The tokens of each row's texts; tokens in the texts' spans are trained.

    A text that no `chat` template wrote gets an EOS, which is trained too. `too_long` applies to a row if
    one of its texts is longer than `max_length` tokens, as in `tokenize_sft`; a dropped row has an empty
    list.

    Raises:
        DataError: a text has nothing to train on within `max_length`, or all rows are dropped.
        ValueError: the tokenizer lacks what this needs.
    """
    _check_max_length(max_length)
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer: got {tokenizer_name(tokenizer)} (slow), expected a fast tokenizer: it records where "
            "each token lies in the text"
        )
    eos = None if chat else _eos_of(tokenizer)
    examples = [(index, text, spans) for index, row in enumerate(answers) for text, spans in row]
    tokenized: list[list[Tokenized]] = [[] for _ in answers]
    merged: list[int] = []
    doubled: list[int] = []
    silent: list[int] = []
    late: list[int] = []
    long: list[int] = []
    # A chat template has already written the special tokens of its text.
    encoded = _encode(tokenizer, [text for _, text, _ in examples], add_special_tokens=not chat, offsets=True)
    for (ids, offsets), (index, _, spans) in zip(encoded, examples, strict=True):
        trained = overlapping(offsets, spans)
        if eos is not None:
            if _has_two_bos(ids, tokenizer):
                doubled.append(index)
            if any(start < spans[0][0] < end for start, end in offsets):
                merged.append(index)
            if ids[-1:] != [eos]:
                ids.append(eos)
                trained.append(True)
            trained[-1] = len(ids) > 1
        if not any(trained):
            silent.append(index)
        elif too_long == "truncate" and not any(trained[:max_length]):
            late.append(index)
        if len(ids) > max_length:
            long.append(index)
        tokenized[index].append(Tokenized(ids, trained))

    within = f"no token to train on within max_length={max_length}: the prompt fills it"
    refuse_rows(rows, {"no token to train on": silent, within: late})
    _report_long(rows, long, too_long, f"max_length={max_length}")
    _warn_of_two_bos(rows, doubled, tokenizer)
    _warn(rows, merged, "a token joins the end of the prompt to the start of the completion, and is trained")
    special_ids = {
        *tokenizer.all_special_ids,
        *(token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special),
    }
    sequences = (sequence for row in tokenized for sequence in row)
    if chat and not any(
        train and token_id in special_ids
        for sequence in sequences
        for token_id, train in zip(*sequence, strict=True)
    ):
        warnings.warn(
            f"{tokenizer_name(tokenizer)}: no special token is trained, so turns may not learn to end",
            stacklevel=3,
        )
    if too_long == "drop":
        for index in long:
            tokenized[index] = []
    return [[Tokenized(ids[:max_length], trained[:max_length]) for ids, trained in row] for row in tokenized]


def holds_messages(rows: Rows, *columns: str) -> bool:
    """Whether the first row with a value in these columns has messages in one of them."""
    for row in as_rows(rows).read([column for column in columns if column in rows.column_names]):
        if any(value is not None for value in row.values()):
            return any(isinstance(value, list) for value in row.values())
    return False


def turn_ends(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end an assistant turn in the chat template; none for rows of text."""
    chat = holds_messages(rows, *WHOLE, "prompt", "completion", "chosen")
    return ChatTemplate(tokenizer).turn_ends() if chat else []


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    *,
    add_special_tokens: bool = True,
    offsets: bool = False,
) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
    """The tokens of each text and, with `offsets`, the characters [start, end) of each token."""
    for begin in range(0, len(texts), BATCH):
        encoded = tokenizer(
            texts[begin : begin + BATCH],
            add_special_tokens=add_special_tokens,
            return_offsets_mapping=offsets,
            return_attention_mask=False,
            verbose=False,
        )
        ids = encoded["input_ids"]
        yield from zip(ids, encoded["offset_mapping"] if offsets else [[]] * len(ids), strict=True)


def _report_long(
    rows: Rows, long: Sequence[int], too_long: TooLong, limit: str, *, side: str = "right"
) -> None:
    """Refuse the rows that are too long, or warn of them. Raises DataError if all rows are dropped."""
    long = list(dict.fromkeys(long))
    if too_long == "refuse":
        refuse_rows(
            rows,
            {f"longer than {limit} (too_long=refuse; drop leaves such rows out, truncate cuts them)": long},
        )
    if too_long == "drop" and len(long) == len(rows):
        refuse_rows(rows, {f"longer than {limit}, and so are all": long})
    _warn(rows, long, f"longer than {limit}, {'left out' if too_long == 'drop' else f'cut at the {side}'}")


def _read_prompt(row: Row) -> str:
    refuse_beside_text(row)
    return read_text("prompt", row["prompt"], blank=True)


def _warn(rows: Rows, indices: Sequence[int], fact: str) -> None:
    if indices := list(dict.fromkeys(indices)):
        warnings.warn(f"{name_rows(rows, indices)}{fact} ({len(indices)} of {len(rows)} rows)", stacklevel=4)


def _has_two_bos(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text that begins with BOS got another one from the tokenizer."""
    bos = tokenizer.bos_token_id
    return bos is not None and ids[0:2] == [bos, bos]


def _warn_of_two_bos(rows: Rows, indices: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> None:
    bos = tokenizer.bos_token
    _warn(
        rows,
        indices,
        f"begins with {bos!r} twice, because the tokenizer adds it too: remove it from the text",
    )


def _check_max_length(max_length: int) -> None:
    if max_length < 2:
        raise ValueError(f"max_length: got {max_length}, expected at least 2, a token and one before it")


def _eos_of(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer: got {tokenizer_name(tokenizer)} without an EOS token, expected one with it"
        )
    return tokenizer.eos_token_id
