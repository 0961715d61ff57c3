"""Calls, tools and the other columns that a chat template reads."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastalign.data import DataError, load_rows, tokenize_prompts, tokenize_sft
from tests.data.chats import CHATML, build
from tests.data.messages import ASKED, GOOD, TALK, chatml, rows_of, sft_text, shown

SAYS_CALLS = (
    "{{ m['content'] }}{% for c in m['tool_calls'] %}"
    "<call>{{ c['function']['name'] }} {{ ARGUMENTS }}</call>{% endfor %}"
)


CALLS = CHATML.replace(
    "{{ m['content'] }}", SAYS_CALLS.replace("ARGUMENTS", "c['function']['arguments'] | tojson")
)


# As DeepSeek's, which puts the text of the arguments between others.
TEXT_CALLS = CHATML.replace(
    "{{ m['content'] }}", SAYS_CALLS.replace("ARGUMENTS", "'' + c['function']['arguments']")
)


TOOLS = "{% for t in tools or [] %}{{ t['name'] }};{% endfor %}" + CHATML


def call(arguments: Any) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}],
    }


# Calls and tools


@pytest.mark.parametrize("template", [CALLS, TEXT_CALLS])
def test_arguments_of_calls_are_parsed_from_text_in_whole_columns_or_mixed(
    tmp_path: Path, template: str
) -> None:
    given: list[Any] = [{"q": "é", "n": None}, '{"q": "é", "n": null}', '{"q": "é", "n": null}', ""]
    expected = ['{"q": "é", "n": null}'] * 3 + ["{}"]
    texts = sft_text(tmp_path, template, *({"messages": [ASKED, call(arguments)]} for arguments in given))
    assert texts == [
        chatml(("user", "What is it?"), ("assistant", f"<call>f {arguments}</call>"))
        for arguments in expected
    ]
    as_text = call({"q": "é", "n": None}) | {
        "tool_calls": json.dumps(call({"q": "é", "n": None})["tool_calls"])
    }
    assert sft_text(tmp_path, template, {"messages": [ASKED, as_text]}) == texts[:1]


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ("{", "got '{', expected JSON in a text"),
        ([3], r"got 'tool_calls' \[3\], expected a list of objects"),
        (call("x")["tool_calls"], "got 'x', expected JSON in a text"),
        (call("[1]")["tool_calls"], r"got 'arguments' \[1\] of a call, expected an object"),
        (call(3)["tool_calls"], "got 'arguments' 3 of a call, expected an object"),
    ],
)
def test_junk_in_calls_is_refused_by_row(tmp_path: Path, calls: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"a\.jsonl, row 2: column 'messages': {message}"):
        sft_text(tmp_path, CALLS, {"messages": TALK}, {"messages": [ASKED, GOOD | {"tool_calls": calls}]})


def test_tools_are_parsed_from_text_in_whole_columns_or_mixed(tmp_path: Path) -> None:
    schemas = [{"name": "f", "x": None}, {"name": "g"}]
    given: list[Any] = [schemas, json.dumps(schemas), [json.dumps(schemas[0]), schemas[1]], None, "null", []]
    texts = sft_text(tmp_path, TOOLS, *({"messages": TALK, "tools": tools} for tools in given))
    said = [("user", "What is it?"), ("assistant", "Great.")]
    assert texts == [chatml(*said, tools="f;g;")] * 3 + [chatml(*said)] * 3
    whole = sft_text(tmp_path, TOOLS, *({"messages": TALK, "tools": json.dumps(schemas)} for _ in range(2)))
    assert whole == texts[:2]


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("junk", "column 'tools': got 'junk', expected JSON in a text"),
        (3, "column 'tools': got int, expected a list of schemas"),
        ({"name": "f"}, "column 'tools': got dict, expected a list of schemas"),
        ([3], "column 'tools': got 3, expected schemas, which are objects"),
        (["junk"], "column 'tools': got 'junk', expected JSON in a text"),
        ([{}], r"column 'tools': got \{\}, expected schemas, which are objects"),
    ],
)
def test_junk_in_tools_is_one_line_with_file_and_row(tmp_path: Path, tools: Any, message: str) -> None:
    for column in ("messages", "prompt"):
        rows = rows_of(
            tmp_path,
            {column: TALK[:1] if column == "prompt" else TALK, "tools": []},
            {column: TALK[:1], "tools": tools},
        )
        with pytest.raises(DataError, match=rf"^{tmp_path}/a\.jsonl, row 2: {message}$"):
            _ = (
                tokenize_sft(rows, build(TOOLS), max_length=64)
                if column == "messages"
                else tokenize_prompts(rows, build(TOOLS), max_length=64)
            )


def test_tools_that_reach_no_template_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match="row 1: column 'tools': got schemas, expected none, because the chat template of",
    ):
        sft_text(tmp_path, CHATML, {"messages": TALK, "tools": [{"name": "f"}]})
    with pytest.raises(
        DataError, match="row 1: column 'tools': got schemas beside a text, expected them beside messages"
    ):
        sft_text(tmp_path, CHATML, {"prompt": "a", "completion": "b", "tools": [{"name": "f"}]})


@pytest.mark.parametrize(
    ("column", "value"),
    [("images", ["a.png"]), ("documents", [{"text": "It rained."}]), ("system", "Be brief.")],
)
def test_a_column_that_would_change_what_the_model_sees_is_refused(
    tmp_path: Path, column: str, value: Any
) -> None:
    with pytest.raises(DataError, match=f"row 1: column '{column}': got "):
        sft_text(tmp_path, CHATML, {"messages": TALK, column: value})


def test_a_genuine_null_of_jsonl_reaches_the_template(tmp_path: Path) -> None:
    [text] = sft_text(tmp_path, CALLS, {"messages": [ASKED, call({"q": None})]})
    assert '<call>f {"q": null}</call>' in text


def test_an_absent_key_of_parquet_does_not_reach_the_template(tmp_path: Path) -> None:
    absent = [{"messages": [ASKED, call({"q": 1})]}, {"messages": [ASKED, call({"r": 2})]}]
    pq.write_table(pa.Table.from_pylist(absent), tmp_path / "a.parquet")
    tokenizer = build(CALLS)
    texts = [
        shown(tokenizer, row)
        for row in tokenize_sft(load_rows(str(tmp_path / "a.parquet")), tokenizer, max_length=512)
    ]
    expected = [
        chatml(("user", "What is it?"), ("assistant", f"<call>f {said}</call>"))
        for said in ('{"q": 1}', '{"r": 2}')
    ]
    assert texts == expected


@pytest.mark.parametrize("tools", [None, [], [{"name": "f"}]])
def test_of_several_templates_the_one_is_taken_that_transformers_would_take(
    tmp_path: Path, tools: Any
) -> None:
    templates = {name: f"{name}{{{{ tools }}}}{CHATML}" for name in ("default", "tool_use", "rag")}
    tokenizer = build(templates)  # type: ignore[arg-type]
    rows = rows_of(tmp_path, {"messages": TALK, "tools": tools}, {"messages": TALK, "tools": [{"name": "g"}]})
    first, second = tokenize_sft(rows, tokenizer, max_length=512)
    assert first.input_ids == tokenizer.apply_chat_template(TALK, tools=tools, return_dict=False)
    assert second.input_ids == tokenizer.apply_chat_template(TALK, tools=[{"name": "g"}], return_dict=False)
    prompts = tokenize_prompts(
        rows_of(tmp_path, {"prompt": TALK[:1], "tools": tools}), tokenizer, max_length=512
    )
    assert prompts[0].input_ids == tokenizer.apply_chat_template(
        TALK[:1], tools=tools, add_generation_prompt=True, return_dict=False
    )
    with pytest.raises(DataError, match=r"row 1: chat templates of .*: got none for it .*\['rag'\]"):
        sft_text(tmp_path, {"rag": CHATML}, {"messages": TALK})
