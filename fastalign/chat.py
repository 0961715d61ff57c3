"""What of a row is trained: the assistant's turns under a chat template, or a completion; as characters, then as tokens.

The DataErrors raised here give the reason alone; `fastalign.data` adds the file and the rows.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

Row = Mapping[str, Any]
Message = dict[str, Any]
Spans = list[tuple[int, int]]  # characters [start, end) of a text that are trained, ascending


class DataError(ValueError):
    """Rows that cannot be trained on. The message names the file, the rows (from 1) and the reason."""


class ChatTemplate:
    """A tokenizer's chat template, which turns a conversation into a text and the spans of it that are trained.

    Raises ValueError for a tokenizer without one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.name = tokenizer_name(tokenizer)
        if not tokenizer.chat_template:
            raise ValueError(f"tokenizer must have a chat template for messages; {self.name} has none")
        self.template = tokenizer.get_chat_template()
        self.has_marks = re.search(r"\{%-?\s*generation\s*-?%\}", self.template) is not None
        self.variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.special = (*tokenizer.all_special_tokens, *added)

    def render(self, row: Row, answer: str = "completion") -> tuple[str, Spans]:
        """The text of `messages`, or of `prompt` and the column `answer`, and what the assistant says in it after the prompt.

        `tools`, where the row has them, are handed to the template. Raises DataError for messages that are none,
        that the template refuses, or whose turns cannot be told apart in its text.
        """
        tools = row.get("tools") or None
        prompt = read_messages("prompt", row["prompt"]) if "prompt" in row else []
        column = answer if "prompt" in row else "messages"
        messages = prompt + read_messages(column, row[column])
        turns = [turn for turn in range(len(prompt), len(messages)) if messages[turn]["role"] == "assistant"]
        if not turns:
            raise DataError(f"column {column!r} has no assistant turn")
        if not any(_says_something(messages[turn]) for turn in turns):
            raise DataError(f"column {column!r} has assistant turns without content only")

        text, marked = self._text(messages, tools, marks=self.has_marks)
        if not self.has_marks:
            return text, [self._added_by(turn, messages, tools, text) for turn in turns]
        if any(message["role"] == "assistant" for message in prompt):
            before, _ = self._text(prompt, tools)
            self._check_prefix(before, text)
            marked = [span for span in marked if span[0] >= len(before)]
        return text, marked

    def prompt(self, row: Row) -> str:
        """The text of `prompt` up to where the assistant's turn begins; `tools` are handed to the template.

        Raises DataError for messages that are none, that the template refuses, or of which the assistant has the last word.
        """
        messages = read_messages("prompt", row["prompt"])
        if not messages:
            raise DataError("column 'prompt' has no messages")
        if messages[-1]["role"] == "assistant":
            raise DataError("column 'prompt' ends in an assistant turn, and there is nothing to answer")
        return self._text(messages, row.get("tools") or None, prompt=True)[0]

    def _added_by(self, turn: int, messages: list[Message], tools: Any, text: str) -> tuple[int, int]:
        """The span that a turn adds to the conversation before it with the generation prompt."""
        before, _ = self._text(messages[:turn], tools, prompt=True)
        after, _ = self._text(messages[: turn + 1], tools) if turn + 1 < len(messages) else (text, [])
        self._check_prefix(before, after)
        self._check_prefix(after, text)
        # The line break that templates put after the end-of-turn token is not the assistant's: it has stopped.
        said = after[len(before) :]
        body = said.rstrip()
        return len(before), len(before) + len(body if body.endswith(self.special) else said)

    def _text(self, messages: list[Message], tools: Any, *, marks: bool = False, prompt: bool = False) -> tuple[str, Spans]:
        try:
            rendered: Any = render_jinja_template(  # annotated as str; texts, and lists of spans
                [messages],
                tools=tools,
                chat_template=self.template,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=prompt,
                **self.variables,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise DataError(f"the chat template of {self.name} refuses it: {error}") from error
        texts, spans = rendered
        return texts[0], spans[0] if marks else []

    def _check_prefix(self, start: str, text: str) -> None:
        if not text.startswith(start):
            raise DataError(
                f"the chat template of {self.name} renders earlier turns differently when later ones follow "
                "(it may drop their reasoning), so what to train on cannot be told; mark it with {% generation %}"
            )


def join_texts(row: Row, answer: str = "completion") -> tuple[str, Spans]:
    """`prompt` and the column `answer` as one text, and the answer's span.

    They are tokenized as a whole and told apart by offsets: on its own an answer would get the space that
    SentencePiece tokenizers put in front of every text. A prompt may be white space, such as a line break; an
    answer may not.
    """
    prompt = read_text("prompt", row["prompt"], blank=True)
    text = prompt + read_text(answer, row[answer])
    return text, [(len(prompt), len(text))]


def overlapping(offsets: Sequence[tuple[int, int]], spans: Spans) -> list[bool]:
    """Whether each token, by its characters [start, end) in the text, is trained: it overlaps a span, and is not the first.

    A tokenizer that trims white space from offsets leaves a token of nothing else empty, at its end: it begins
    where the one before it ended. Special tokens that the tokenizer adds are at (0, 0), and not trained.
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
    """`text`, or DataError for what is no text, or empty: without a character, or unless `blank` with white space only."""
    if text is None:
        raise DataError(f"column {column!r} is missing or null")
    if not isinstance(text, str):
        raise DataError(f"column {column!r} must be text, got {type(text).__name__}")
    if not (text if blank else text.strip()):
        raise DataError(f"column {column!r} is empty")
    return text


def read_messages(column: str, messages: Any) -> list[Message]:
    """The messages without keys of None: Parquet gives each all keys, but templates ask whether a key is there.

    Raises DataError for what is no list of messages.
    """
    if not isinstance(messages, list):
        raise DataError(f"column {column!r} must be a list of messages, got {type(messages).__name__}")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            seen = f"the keys {', '.join(message)}" if isinstance(message, dict) else type(message).__name__
            raise DataError(f"column {column!r} must hold messages with a 'role' and a 'content', got {seen}")
        if not isinstance(message.get("content"), str | list | None):
            seen = type(message["content"]).__name__
            raise DataError(f"column {column!r} must hold messages whose 'content' is text, got {seen}")
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """What messages call a tokenizer: where it was loaded from, or else its class."""
    return tokenizer.name_or_path or type(tokenizer).__name__


def _says_something(message: Message) -> bool:
    said = (value for key, value in message.items() if key != "role")
    return any(value.strip() if isinstance(value, str) else value for value in said)
