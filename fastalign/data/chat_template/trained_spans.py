"""The text of a conversation, and which of its characters are trained: the assistant's turns.

The DataErrors raised here give only the reason; `rows.read_each` adds the file and the rows.
"""

import warnings
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from ..rows import Row
from ..texts import Spans, tokenizer_name
from .messages import (
    Message,
    read_messages,
    read_sharegpt,
    read_tools,
    refuse_unserved,
    says_something,
    separate,
    take_weights,
)
from .rendering import Call
from .template import MARK, Template

WHOLE = ("messages", "conversations")  # columns that hold a whole conversation, without a prompt


class ChatTemplate:
    """A tokenizer's chat template. It turns a conversation into a text and the trained spans of that text.

    If there are several templates, it takes transformers' choice for the row: `tool_use` if the row has
    `tools`, else `default`. Raises ValueError for a tokenizer without a template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.name = tokenizer_name(tokenizer)
        if not tokenizer.chat_template:
            raise ValueError(
                f"tokenizer: got {self.name} without a chat template, expected one with it for messages"
            )
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.special = (*tokenizer.all_special_tokens, *added)
        self._tokenizer = tokenizer
        self._templates: dict[str, Template] = {}

    def render(self, row: Row, *columns: str) -> list[tuple[str, Spans]]:
        """For each column, the text of prompt and answer, and the trained spans of the answer.

        The columns are `messages` or `conversations` alone, or those that answer `prompt`
        (`messages.separate`). Raises DataError for malformed messages, for messages that the template
        refuses or would lose a part of, and for turns that cannot be told apart in its text.
        """
        template, tools = self._choose(row)
        prompt: list[Message] = []
        if columns[0] in WHOLE:
            read = read_sharegpt if columns[0] == "conversations" else read_messages
            answers = [read(columns[0], row[columns[0]])]
        else:
            prompt, answers = separate(row, columns)
        return [
            self._answer(template, tools, prompt, *answer) for answer in zip(columns, answers, strict=True)
        ]

    def prompt(self, row: Row) -> str:
        """The text of `prompt` up to where the assistant's turn begins. `tools` go to the template.

        Raises DataError for malformed messages, for messages that the template refuses, and if the
        assistant has the last word.
        """
        messages = read_messages("prompt", row["prompt"])
        if not messages:
            raise DataError("column 'prompt': got no messages, expected at least one")
        if messages[-1]["role"] == "assistant":
            raise DataError("column 'prompt': got an assistant turn at the end, expected a turn to answer")
        template, tools = self._choose(row)
        messages, _ = take_weights("prompt", messages)
        [rendered] = template.render(Call(template.fit("prompt", messages), tools, prompt=True))
        return rendered.text

    def answered(self, row: Row, answer: str) -> str:
        """The text of the whole conversation: `prompt` and an answer to it."""
        template, tools = self._choose(row)
        messages, _ = take_weights("prompt", read_messages("prompt", row["prompt"]))
        [rendered] = template.render(
            Call(template.fit("prompt", [*messages, {"role": "assistant", "content": answer}]), tools)
        )
        return rendered.text

    def turn_ends(self) -> list[int]:
        """The ids of special tokens that end a trained assistant turn: an answer, or a tool call."""
        asked: Message = {"role": "user", "content": "x"}
        call = {"type": "function", "id": "call00001", "function": {"name": "f", "arguments": {"q": MARK}}}
        says: list[Message] = [
            {"role": "assistant", "content": MARK},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        ends = set()
        for tools in (None, [call]):
            try:
                template = self._of(tools)
            except DataError:
                continue
            for answer in says if template.keys.reads("tool_calls") else says[:1]:
                try:
                    text, spans = self._answer(template, None, [asked], "completion", [answer])
                except DataError:
                    continue  # a template that wants more than a question and its answer
                said = text[spans[-1][0] : spans[-1][1]].rstrip() if spans else ""
                ends |= {token for token in self.special if token and MARK in said and said.endswith(token)}
        return sorted(self._tokenizer.convert_tokens_to_ids(token) for token in ends)

    def _choose(self, row: Row) -> tuple[Template, list[Any] | None]:
        """The row's template, and its tools."""
        refuse_unserved(row)
        tools = read_tools(row.get("tools"))
        template = self._of(tools)
        template.check_tools(tools)
        return template, tools

    def _of(self, tools: list[Any] | None) -> Template:
        try:
            source = self._tokenizer.get_chat_template(tools=tools)
        except ValueError as error:  # several, and none of them for this row
            raise DataError(
                f"chat templates of {self.name}: got none for it ({error}), expected one"
            ) from error
        if source not in self._templates:
            if "strftime_now(" in source:
                warnings.warn(
                    f"chat template of {self.name}: it writes the date (strftime_now), so the same rows have "
                    "other tokens on another day, also if a run resumes: write a fixed date into it",
                    stacklevel=2,
                )
            self._templates[source] = Template(
                source, name=self.name, variables=self._tokenizer.special_tokens_map
            )
        return self._templates[source]

    def _answer(
        self,
        template: Template,
        tools: list[Any] | None,
        prompt: list[Message],
        column: str,
        answer: list[Message],
    ) -> tuple[str, Spans]:
        """The text of a conversation, and the trained spans of its messages after the prompt."""
        turns = [message for message in answer if message["role"] == "assistant"]
        if not turns:
            raise DataError(f"column {column!r}: got no assistant turn, expected at least one")
        if not any(map(says_something, turns)):
            raise DataError(
                f"column {column!r}: got only assistant turns without content, expected one with content"
            )
        asked, _ = take_weights("prompt", prompt)
        said, trained = take_weights(column, answer)
        if not any(trained):
            raise DataError(
                f"column {column!r}: got only assistant turns of weight 0, expected one of weight 1"
            )
        messages = template.fit("prompt", asked) + template.fit(column, said)
        trained_turns = [len(prompt) + turn for turn, train in enumerate(trained) if train]
        if not template.has_marks:
            return self._by_prefixes(template, tools, messages, trained_turns)
        untrained_turns = [
            len(prompt) + turn
            for turn, message in enumerate(said)
            if message["role"] == "assistant" and not trained[turn]
        ]
        untrained = [range(turn, turn + 1) for turn in untrained_turns]
        if any(message["role"] == "assistant" for message in prompt):
            untrained.append(range(len(prompt)))
        return self._by_marks(template, tools, messages, untrained)

    def _by_prefixes(
        self, template: Template, tools: list[Any] | None, messages: list[Message], turns: list[int]
    ) -> tuple[str, Spans]:
        """A turn's span is what it adds to the conversation before it with the generation prompt."""
        calls = [Call(messages, tools)]
        for turn in turns:
            calls += [Call(messages[:turn], tools, prompt=True), Call(messages[: turn + 1], tools)]
        text, *parts = (rendered.text for rendered in template.render(*calls))
        spans = []
        for turn, before, after in zip(turns, parts[::2], parts[1::2], strict=True):
            if not after.startswith(before):
                self._explain(template, tools, messages[: turn + 1], before, after)
            self._check_prefix(after, text)
            # The line break that templates put after the end-of-turn token is not trained: the assistant
            # has stopped.
            said = after[len(before) :]
            body = said.rstrip()
            spans.append((len(before), len(before) + len(body if body.endswith(self.special) else said)))
        return text, spans

    def _by_marks(
        self, template: Template, tools: list[Any] | None, messages: list[Message], untrained: list[range]
    ) -> tuple[str, Spans]:
        """The spans that the template marks, without those of untrained messages."""
        ends = sorted({end for turns in untrained for end in (turns.start, turns.stop)} - {0})
        (text, spans, _), *parts = template.render(
            Call(messages, tools, marks=True), *(Call(messages[:end], tools) for end in ends)
        )
        lengths = {0: 0}
        for end, part in zip(ends, parts, strict=True):
            self._check_prefix(part.text, text)
            lengths[end] = len(part.text)
        for turns in untrained:
            spans = [span for span in spans if not lengths[turns.start] <= span[0] < lengths[turns.stop]]
        return text, spans

    def _explain(
        self, template: Template, tools: list[Any] | None, messages: list[Message], before: str, after: str
    ) -> None:
        """Raise DataError for an assistant turn that does not continue the generation prompt."""
        [plain] = template.try_render(Call(messages[:-1], tools))
        asked, begins = before.removeprefix(plain.text), after.removeprefix(plain.text)
        if plain.error is None and before.startswith(plain.text) and after.startswith(plain.text):
            begin = begins[: len(asked) + 10]
            raise DataError(
                f"chat template of {self.name}: got an answer that begins with {begin!r}, "
                f"expected its generation prompt {asked!r}: put what is missing into the answer, or "
                "mark what to train on with {% generation %}"
            )
        self._check_prefix(before, after)

    def _check_prefix(self, start: str, text: str) -> None:
        if not text.startswith(start):
            raise DataError(
                f"chat template of {self.name}: got earlier turns rendered differently when later ones "
                "follow (it may drop their reasoning), expected the same text, to find what to train on: "
                "mark that with {% generation %}"
            )
