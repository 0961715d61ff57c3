"""Rows of text in, batches of tokens out: tokenization, packing, collation. `load_rows` is of readers.py.

Reading and tokenizing need no model, so bad data is refused before one is loaded: DataError names the file,
the column and the rows, counted from 1 as an editor shows them. B batch rows, T time, S sequences, as
everywhere.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from transformers import PreTrainedTokenizerBase

from .chat_template.messages import UNSERVED, refuse_beside_text
from .chat_template.trained_spans import WHOLE, ChatTemplate
from .errors import DataError
from .readers import load_rows as load_rows
from .row_parts import BATCH
from .rows import Row, Rows, as_rows, name_rows, need_columns, read_each, refuse_rows
from .texts import Spans, join_texts, overlapping, read_text, tokenizer_name
from .tokens import Prompt, Tokenized

TooLong = Literal["refuse", "drop", "truncate"]
BESIDE = ("tools", *UNSERVED)  # columns beside texts or messages that change what the model is to see


def tokenize_text(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    column: str = "text",
    too_long: Literal["split", "refuse", "drop", "truncate"] = "split",
) -> list[Tokenized]:
    """Documents for pre-training: the tokenizer's own special tokens (BOS where it adds one), then one EOS.

    A document longer than `max_length` tokens is split into pieces that overlap by one token, so that each of
    its tokens but the first is a target exactly once; or else `too_long` applies to it as in `tokenize_sft`.
    Raises DataError for a missing column and rows that are not text or empty.
    """
    _check_max_length(max_length)
    eos = _eos_of(tokenizer)
    need_columns(rows, column)
    texts = read_each(rows, [column], lambda row: read_text(column, row[column]))
    pieces = []
    empty, long = [], []
    for index, (ids, _) in enumerate(_encode(tokenizer, texts)):
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
    if too_long != "split":
        _report_long(rows, long, too_long, f"sequence_length={max_length}")
    return pieces


def tokenize_sft(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, *, max_length: int, too_long: TooLong = "drop"
) -> list[Tokenized]:
    """Demonstrations, one a row: `messages`, or `prompt` and `completion` (both text, or messages).

    Of `messages`, every assistant turn is trained, with its end-of-turn token, but those of "weight" 0; of
    `prompt` and `completion`, the completion alone, with an EOS after text. The chat template's own {%
    generation %} marks say what belongs to a turn; where it has none, it is what the turn adds to the
    conversation before it with the generation prompt. A `tools` column is handed to the template. ShareGPT's
    `conversations` are read as messages. A completion of messages may repeat its prompt, which may then be
    the text of the user's last turn.

    Rows longer than `max_length` tokens are refused, left out or cut at the right (`too_long`), the latter
    two with one warning that counts them. Raises DataError for missing columns, wrong types, rows with
    nothing to train on (within `max_length`), messages of which the template would lose a part, and rows
    whose earlier turns the template rewrites, where the difference would mask wrongly; ValueError for a
    tokenizer that lacks what this needs.
    """
    whole = [column for column in WHOLE if column in rows.column_names]
    if whole and "completion" in rows.column_names:
        raise DataError(
            f"{name_rows(rows)}columns {whole[0]!r} and 'completion' exclude each other: remove one"
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
    """Prompts to complete, one a row: `prompt`, as text, or as messages that the template follows with the
    assistant's turn.

    Text gets the tokenizer's own special tokens, less an EOS behind it. Prompts longer than `max_length`
    tokens are refused, left out or cut at the left (`too_long`), as what follows depends on their end; the
    latter two with one warning that counts them. Raises DataError for a missing column, wrong types, messages
    that the assistant ends, prompts without tokens, and where all are left out; ValueError for a tokenizer
    that lacks what this needs.
    """
    need_columns(rows, "prompt")
    chat = holds_messages(rows, "prompt")
    convert = ChatTemplate(tokenizer).prompt if chat else _read_prompt
    texts = read_each(rows, ["prompt"], convert, BESIDE)
    prompts, empty, long = [], [], []
    encoded = _encode(tokenizer, texts, add_special_tokens=not chat)
    for index, ((ids, _), row) in enumerate(zip(encoded, as_rows(rows).read(), strict=True)):
        if not chat and ids[-1:] == [tokenizer.eos_token_id] and len(ids) > 1:
            ids.pop()
        if not ids:
            empty.append(index)
        if len(ids) > max_length:
            long.append(index)
        if len(ids) <= max_length or too_long == "truncate":
            prompts.append(Prompt(ids[-max_length:], row))
    refuse_rows(rows, {"column 'prompt' has no tokens": empty})
    _report_long(rows, long, too_long, f"max_prompt_length={max_length}", side="left")
    return prompts


def answer_converter(
    tokenizer: PreTrainedTokenizerBase, *columns: str, chat: bool
) -> Callable[[Row], list[tuple[str, Spans]]]:
    """From a row to the text of its prompt with each of the columns, and what of it is trained: by the chat
    template, or as text."""
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
    """The tokens of each row's texts, whose spans are trained; a text that no `chat` template wrote gets an
    EOS, trained too.

    A row with a text longer than `max_length` tokens is refused, or left out, so that its list is empty, or
    cut at the right (`too_long`), the latter two with one warning. Raises DataError for rows with a text that
    has nothing to train on (within `max_length`), and where all are left out; ValueError for a tokenizer that
    lacks what this needs.
    """
    _check_max_length(max_length)
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer must be fast, to know where tokens lie in a text; {tokenizer_name(tokenizer)} is not"
        )
    eos = None if chat else _eos_of(tokenizer)
    examples = [(index, text, wanted) for index, row in enumerate(answers) for text, wanted in row]
    tokenized: list[list[Tokenized]] = [[] for _ in answers]
    merged: list[int] = []
    silent: list[int] = []
    late: list[int] = []
    long: list[int] = []
    # A chat template has written the special tokens of its text.
    encoded = _encode(tokenizer, [text for _, text, _ in examples], add_special_tokens=not chat, offsets=True)
    for (ids, offsets), (index, _, wanted) in zip(encoded, examples, strict=True):
        trained = overlapping(offsets, wanted)
        if eos is not None:
            if any(start < wanted[0][0] < end for start, end in offsets):
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
    _warn(rows, merged, "a token joins the end of the prompt to the start of the completion, and is trained")
    special = {
        *tokenizer.all_special_ids,
        *(id for id, token in tokenizer.added_tokens_decoder.items() if token.special),
    }
    sequences = (sequence for row in tokenized for sequence in row)
    if chat and not any(
        train and id in special for sequence in sequences for id, train in zip(*sequence, strict=True)
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
    """Whether the first row that has something in these columns has messages in one of them."""
    for row in as_rows(rows).read([column for column in columns if column in rows.column_names]):
        if any(value is not None for value in row.values()):
            return any(isinstance(value, list) for value in row.values())
    return False


def turn_ends(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end an assistant's turn in the chat template of rows of messages; none for rows of
    text."""
    chat = holds_messages(rows, *WHOLE, "prompt", "completion", "chosen")
    return ChatTemplate(tokenizer).turn_ends() if chat else []


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    *,
    add_special_tokens: bool = True,
    offsets: bool = False,
) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
    """The tokens of each text, and with `offsets` the characters [start, end) where each of them lies."""
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
    """Refuse the rows that are too long, or warn of them. Raises DataError where all are, and are left
    out."""
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


def _check_max_length(max_length: int) -> None:
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, a token and one before it; got {max_length}")


def _eos_of(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer must have an EOS token; {tokenizer_name(tokenizer)} has none")
    return tokenizer.eos_token_id
