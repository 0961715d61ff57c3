"""A row's messages: roles, contents, tool calls, trained turns, and where the prompt ends.

The DataErrors raised here give only the reason; `rows.read_each` adds the file and the rows.
"""

from collections.abc import Sequence
from typing import Any

from ..errors import DataError
from ..rows import Row
from ..strict_json import DECODER

Message = dict[str, Any]

SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
# Columns beside messages that would change what the model sees.
UNSERVED = (
    "image",
    "images",
    "video",
    "videos",
    "audio",
    "audios",
    "chat_template_kwargs",
    "documents",
    "system",
)
# Keys that only identify messages. The model need not see them, so a template may leave them out.
LABELS = ("id", "message_id", "turn_id", "timestamp", "created_at", "tool_call_id")


def read_messages(column: str, messages: Any) -> list[Message]:
    """The messages, without keys whose value is None: templates test whether a key exists.

    `tool_calls`, or the `arguments` of a call, that are JSON in a string are parsed. Raises DataError for a
    value that is no list of messages, for parts of a content that are no text, and for malformed calls.
    """
    if not isinstance(messages, list):
        raise DataError(f"column {column!r}: got {type(messages).__name__}, expected a list of messages")
    return [_read_message(column, message) for message in messages]


def read_sharegpt(column: str, messages: Any) -> list[Message]:
    """The messages of a column, in `read_messages`' form or in ShareGPT's, with `from` and `value`."""
    if not isinstance(messages, list) or not any(
        isinstance(message, dict) and "from" in message for message in messages
    ):
        return read_messages(column, messages)
    renamed = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("from"), str):
            found = f"the keys {', '.join(message)}" if isinstance(message, dict) else type(message).__name__
            raise DataError(f"column {column!r}: got {found}, expected messages with a 'from' and a 'value'")
        if message["from"] not in SHAREGPT:
            raise DataError(
                f"column {column!r}: got a message from {message['from']!r}, expected {', '.join(SHAREGPT)}"
            )
        further = {key: value for key, value in message.items() if key not in ("from", "value")}
        renamed.append({"role": SHAREGPT[message["from"]], "content": message.get("value")} | further)
    return read_messages(column, renamed)


def read_tools(tools: Any) -> list[dict[str, Any]] | None:
    """The schemas of a row's `tools`: a list, or JSON in a string, of all or of each; None without them."""
    tools = _parse("tools", tools) if isinstance(tools, str) else tools
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise DataError(f"column 'tools': got {type(tools).__name__}, expected a list of schemas")
    schemas = [_parse("tools", tool) if isinstance(tool, str) else tool for tool in tools]
    for schema in schemas:
        if not isinstance(schema, dict) or not schema:
            raise DataError(f"column 'tools': got {_show(schema)}, expected schemas, which are objects")
    return schemas


def refuse_unserved(row: Row) -> None:
    """Raise DataError if a column beside the messages has content that the chat template would not get."""
    for column in UNSERVED:
        if row.get(column):
            raise DataError(
                f"column {column!r}: got {_show(row[column])}, expected nothing there, because a chat "
                "template gets messages of text, and tools: write it into the messages or remove the column"
            )


def refuse_beside_text(row: Row) -> None:
    """Raise DataError if a row of text has content that only a chat template would read."""
    refuse_unserved(row)
    if row.get("tools"):
        raise DataError(
            "column 'tools': got schemas beside a text, expected them beside messages: "
            "a text goes through no chat template; remove the column"
        )


def separate(row: Row, columns: Sequence[str]) -> tuple[list[Message], list[list[Message]]]:
    """The messages of the prompt, and those that each of the columns adds to it.

    `prompt` is a list of messages, which a column may repeat; or a text, which is then the last user turn
    that the columns' whole conversations share; or absent, and then the prompt is what two columns begin
    with.
    """
    prompt = read_messages("prompt", row["prompt"]) if isinstance(row.get("prompt"), list) else None
    conversations = [read_messages(column, row[column]) for column in columns]
    if prompt is not None:
        return prompt, [_without(prompt, *pair) for pair in zip(columns, conversations, strict=True)]
    named = " and ".join(map(repr, columns))
    what = f"column{'s' * (len(columns) > 1)} {named}"
    if "prompt" in row:
        text = row["prompt"]
        if not isinstance(text, str):
            raise DataError(
                f"column 'prompt': got {type(text).__name__}, expected a list of messages, or a text"
            )
        lengths = [_after_text(text, conversation) for conversation in conversations]
        if None in lengths:
            raise DataError(
                f"{what}: got no user's turn with the text of column 'prompt' before an answer, expected "
                "whole conversations"
            )
        shared = lengths[0] or 0
        if (
            any(conversation[:shared] != conversations[0][:shared] for conversation in conversations)
            or len(set(lengths)) > 1
        ):
            raise DataError(
                f"{what}: got conversations that differ before the answer, expected the same messages up to "
                "the text of column 'prompt'"
            )
    else:
        first, *rest = conversations
        shared = next(
            (
                place
                for place, message in enumerate(first)
                if any(other[place : place + 1] != [message] for other in rest)
            ),
            len(first),
        )
        if not shared:
            raise DataError(
                f"{what}: got no shared first messages, expected them where there is no column 'prompt'"
            )
    return conversations[0][:shared], [conversation[shared:] for conversation in conversations]


def take_weights(column: str, messages: Sequence[Message]) -> tuple[list[Message], list[bool]]:
    """The messages without `weight`, and whether each is trained.

    An assistant's turn is trained if its weight is 1 or absent.
    """
    trained = []
    for message in messages:
        assistant, weight = message["role"] == "assistant", message.get("weight")
        if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
            raise DataError(f"column {column!r}: got a 'weight' of {_show(weight)}, expected 0 or 1")
        if weight and not assistant:
            raise DataError(
                f"column {column!r}: got a 'weight' of 1 on a turn of role {message['role']!r}, expected it "
                "on the assistant's turns, which alone are trained"
            )
        trained.append(assistant and weight != 0)
    return [
        {key: value for key, value in message.items() if key != "weight"} for message in messages
    ], trained


def join_parts(content: Any) -> Any:
    """The text of a content of parts, joined as templates write them."""
    return "".join(part["text"] for part in content) if isinstance(content, list) else content


def says_something(message: Message) -> bool:
    """Whether a message has more than a role."""
    said = (
        join_parts(value) if key == "content" else value
        for key, value in message.items()
        if key not in ("role", "weight", *LABELS)
    )
    return any(value.strip() if isinstance(value, str) else value for value in said)


def _read_message(column: str, message: Any) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        found = f"the keys {', '.join(message)}" if isinstance(message, dict) else type(message).__name__
        hint = (
            "; rename ShareGPT's 'from' and 'value'"
            if isinstance(message, dict) and "from" in message
            else ""
        )
        raise DataError(
            f"column {column!r}: got {found}, expected messages with a 'role' and a 'content'{hint}"
        )
    message = {key: value for key, value in message.items() if value is not None}
    if not message.keys() - {"role", "weight", *LABELS}:
        raise DataError(
            f"column {column!r}: got a message of role {message['role']!r} without a 'content', expected one"
        )
    content = message.get("content")
    if not isinstance(content, str | list | None):
        raise DataError(f"column {column!r}: got a 'content' of type {type(content).__name__}, expected text")
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        further_keys = (
            [key for key in part if key not in ("type", "text") and part[key] is not None]
            if kind == "text"
            else []
        )
        if kind != "text" or not isinstance(part.get("text"), str) or further_keys:
            raise DataError(
                f"column {column!r}: got a part {_show(part)} of a content, expected parts "
                "{'type': 'text', 'text': …}"
            )
    if isinstance(content, list):
        message["content"] = [{"type": "text", "text": part["text"]} for part in content]
    if "tool_calls" in message:
        message["tool_calls"] = _read_calls(column, message["tool_calls"])
    return message


def _read_calls(column: str, calls: Any) -> list[dict[str, Any]]:
    calls = _parse(column, calls) if isinstance(calls, str) else calls
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise DataError(f"column {column!r}: got 'tool_calls' {_show(calls)}, expected a list of objects")
    read = []
    for call in calls:
        inner = call["function"] if isinstance(call.get("function"), dict) else call
        arguments = inner.get("arguments")
        if isinstance(arguments, str):
            arguments = _parse(column, arguments) if arguments.strip() else {}
            inner = inner | {"arguments": arguments}
        if not isinstance(arguments, dict | None):
            raise DataError(
                f"column {column!r}: got 'arguments' {_show(arguments)} of a call, expected an object"
            )
        read.append(call | {"function": inner} if isinstance(call.get("function"), dict) else inner)
    return read


def _without(prompt: Sequence[Message], column: str, messages: list[Message]) -> list[Message]:
    """The messages after a prompt that they may repeat."""
    if prompt and messages[: len(prompt)] == prompt:
        return messages[len(prompt) :]
    first = messages[0]["role"] if messages else "assistant"
    if prompt and first in ("system", "user") and (first == "system" or prompt[-1]["role"] == "user"):
        raise DataError(
            f"column {column!r}: got a first turn of role {first!r} after a prompt that ends in one of role "
            f"{prompt[-1]['role']!r}, expected the answer alone, or the whole prompt and the answer"
        )
    return messages


def _after_text(text: str, messages: Sequence[Message]) -> int | None:
    """How many messages there are up to the last user turn that says `text` and is answered."""
    for place in range(len(messages) - 2, -1, -1):
        message = messages[place]
        if message["role"] == "user" and join_parts(message.get("content", "")).strip() == text.strip():
            return place + 1
    return None


def _parse(column: str, text: str) -> Any:
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"column {column!r}: got {_show(text)}, expected JSON in a text") from error


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
