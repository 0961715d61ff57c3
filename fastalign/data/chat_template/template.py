"""One chat template: what it reads, what it would lose, and the texts that it makes."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import DataError, FatalDataError
from .messages import LABELS, Message, join_parts
from .rendering import Call, Rendered, render
from .template_keys import TemplateKeys

MARK = "Fastalign"  # what probes say; no template writes it by itself
# Keys for what a model thinks before it answers; a template reads one of them.
REASONING = ("reasoning_content", "thinking", "reasoning")
_CALL = {"name": "f", "arguments": {"q": MARK}}


class Takes(NamedTuple):
    """Which forms of a role's content reach the text."""

    text: bool
    parts: bool


class Template:
    """The template `source` of the tokenizer `name`. `variables` go to it beside messages and tools."""

    def __init__(self, source: str, *, name: str, variables: Mapping[str, Any]) -> None:
        self.source, self.name, self.variables = source, name, variables
        self.has_marks = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
        self.keys = TemplateKeys(source)
        self._takes: dict[str, Takes] = {}
        self._arguments_as_text: bool | None = None

    def try_render(self, *calls: Call) -> list[Rendered]:
        """What the template makes of each call, or why it makes nothing.

        Raises FatalDataError if it takes too long.
        """
        try:
            return render(self.source, self.variables, calls)
        except FatalDataError as error:
            raise FatalDataError(f"chat template of {self.name}: {error}") from error

    def render(self, *calls: Call) -> list[Rendered]:
        """The texts of the calls; raises DataError for a call that the template refuses."""
        made = self.try_render(*calls)
        for rendered in made:
            if rendered.error is not None:
                raise DataError(
                    f"chat template of {self.name}: got the error {rendered.error}, expected a text"
                )
        return made

    def fit(self, column: str, messages: Sequence[Message]) -> list[Message]:
        """The messages in the form that this template reads.

        Contents become text or parts, arguments of calls objects or text.

        Raises DataError for a key that the template does not read.
        """
        return [self._fit(column, message) for message in messages]

    def check_tools(self, tools: Sequence[Any] | None) -> None:
        """Raise DataError for tools that the template does not show to the model."""
        if tools and not self.keys.uses("tools"):
            raise DataError(
                f"column 'tools': got schemas, expected none, because the chat template of {self.name} does "
                "not read tools: remove the column"
            )

    def _fit(self, column: str, message: Message) -> Message:
        fitted: Message = {}
        read = next((key for key in REASONING if self.keys.reads(key)), None)
        for key, value in message.items():
            if key in REASONING and read and not self.keys.reads(key) and read not in message:
                fitted[read] = value
                continue
            named_tool = key == "name" and message["role"] == "tool"  # the call before it has the name too
            if (
                key not in ("role", "content", *LABELS)
                and not named_tool
                and not self.keys.reads(key)
                and value not in ("", [], {})
            ):
                raise DataError(
                    f"column {column!r}: got messages with the key {key!r}, expected none that the chat "
                    f"template of {self.name} does not read: remove it, or use a template that reads it"
                )
            fitted[key] = value
        if content := fitted.get("content"):
            takes = self._takes_of(message["role"])
            if isinstance(content, list) and not takes.parts:
                fitted["content"] = join_parts(content)
            elif isinstance(content, str) and takes.parts and not takes.text:
                fitted["content"] = [{"type": "text", "text": content}]
        if fitted.get("tool_calls") and self._wants_arguments_as_text():
            fitted["tool_calls"] = [_with_text_arguments(call) for call in fitted["tool_calls"]]
        return fitted

    def _takes_of(self, role: str) -> Takes:
        if role not in self._takes:
            before: dict[str, list[Message]] = {"assistant": [{"role": "user", "content": "x"}]}
            before["tool"] = [
                *before["assistant"],
                {"role": "assistant", "tool_calls": [_CALL | {"type": "function", "function": _CALL}]},
            ]
            after = [{"role": "user", "content": "x"}] if role == "system" else []
            contents = (MARK, [{"type": "text", "text": MARK}])
            text, parts = self.try_render(
                *(
                    Call([*before.get(role, []), {"role": role, "content": content}, *after])
                    for content in contents
                )
            )
            # A template that takes text alone may print the parts as Python or JSON does.
            takes = Takes(
                MARK in text.text, MARK in parts.text and not re.search(r"""['"]text['"]""", parts.text)
            )
            if not any(takes):
                takes = Takes(text=True, parts=False) if role == "user" else self._takes_of("user")
            self._takes[role] = takes
        return self._takes[role]

    def _wants_arguments_as_text(self) -> bool:
        if self._arguments_as_text is None:
            calls = [_CALL | {"type": "function", "id": "call00001", "function": _CALL}]
            calls += [_with_text_arguments(calls[0])]
            users = {"role": "user", "content": "x"}
            as_object, as_text = self.try_render(
                *(Call([users, {"role": "assistant", "content": "", "tool_calls": [call]}]) for call in calls)
            )
            objects = MARK in as_object.text and "'q'" not in as_object.text
            self._arguments_as_text = not objects and MARK in as_text.text and '\\"' not in as_text.text
        return self._arguments_as_text


def _with_text_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    changed = dict(call)
    if isinstance(call.get("arguments"), dict):
        changed["arguments"] = json.dumps(call["arguments"], ensure_ascii=False)
    if isinstance(call.get("function"), dict):
        changed["function"] = _with_text_arguments(call["function"])
    return changed
