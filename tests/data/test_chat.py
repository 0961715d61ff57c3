"""What a row of messages means: parts, calls, tools, weights, prompts, templates that choose, fail or try to
escape."""

import json
import warnings
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from fastalign import rendering
from fastalign.chat import ChatTemplate
from fastalign.data import (
    DataError,
    Tokenized,
    load_rows,
    tokenize_prompts,
    tokenize_sft,
    tokenize_text,
    turn_ends,
)
from fastalign.preferences import tokenize_pairs, tokenize_unpaired
from fastalign.rows import Rows
from fastalign.template_keys import TemplateKeys
from tests.data.test_data import CHATML, HEADER, MARKED, PROMPT, build, trained_text

ASKED = {"role": "user", "content": "What is it?"}
GOOD = {"role": "assistant", "content": "Great."}
BAD = {"role": "assistant", "content": "Bad."}
TALK = [ASKED, GOOD]
# As Llama 3.2 Vision, SmolVLM and others.
PARTS = CHATML.replace(
    "{{ m['content'] }}",
    "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}",
)
EITHER = CHATML.replace(
    "{{ m['content'] }}",
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endif %}",
)
SAYS_CALLS = "{{ m['content'] }}{% for c in m['tool_calls'] %}<call>{{ c['function']['name'] }} {{ ARGUMENTS }}</call>{% endfor %}"
CALLS = CHATML.replace(
    "{{ m['content'] }}", SAYS_CALLS.replace("ARGUMENTS", "c['function']['arguments'] | tojson")
)
# As DeepSeek's, which puts the text of the arguments between others.
TEXT_CALLS = CHATML.replace(
    "{{ m['content'] }}", SAYS_CALLS.replace("ARGUMENTS", "'' + c['function']['arguments']")
)
TOOLS = "{% for t in tools or [] %}{{ t['name'] }};{% endfor %}" + CHATML


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def rows_of(folder: Path, *rows: Any) -> Rows:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_rows(str(folder / "a.jsonl"))


def sft_text(folder: Path, template: Any, *rows: Any) -> list[str]:
    """What is trained and what is not, with | where one ends."""
    tokenizer = build(template)
    return [
        shown(tokenizer, sequence)
        for sequence in tokenize_sft(rows_of(folder, *rows), tokenizer, max_length=512)
    ]


def shown(tokenizer: Any, sequence: Tokenized) -> str:
    runs = groupby(zip(*sequence, strict=True), key=lambda token: token[1])
    return "|".join(str(tokenizer.decode([token for token, _ in run])) for _, run in runs)


def chatml(*messages: Any, tools: str = "") -> str:
    """The text in which all that the assistant says is trained."""
    parts = [
        f"<|im_start|>{role}\n" + (f"|{said}<|im_end|>|\n" if role == "assistant" else f"{said}<|im_end|>\n")
        for role, said in messages
    ]
    return tools + "".join(parts)


def call(arguments: Any) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}],
    }


# Contents


@pytest.mark.parametrize("template", [CHATML, MARKED, PARTS, EITHER])
def test_parts_of_text_are_joined_or_passed_as_the_template_takes_them(tmp_path: Path, template: str) -> None:
    parts = [{"type": "text", "text": "What "}, {"type": "text", "text": "is it?"}]
    rows = [
        {"messages": TALK},
        {
            "messages": [
                {"role": "user", "content": parts},
                GOOD | {"content": [{"type": "text", "text": "Great."}]},
            ]
        },
    ]
    expected = chatml(("user", "What is it?"), ("assistant", "Great."))
    assert sft_text(tmp_path, template, *rows) == [expected, expected]


@pytest.mark.parametrize(
    ("part", "seen"),
    [
        ({"type": "image"}, r"\{'type': 'image'\}"),
        ({"type": "image_url", "image_url": {"url": "x"}}, "image_url"),
        ({"type": "audio", "audio": "x"}, "audio"),
        ({"type": "text", "text": "x", "image": "y"}, "image"),
        ({"type": "text"}, "text"),
        ("x", "'x'"),
    ],
)
@pytest.mark.parametrize("template", [CHATML, PARTS])
def test_other_parts_are_refused_by_row(tmp_path: Path, template: str, part: Any, seen: str) -> None:
    with pytest.raises(
        DataError, match=rf"a\.jsonl, row 2: column 'messages' must hold contents whose parts are .*{seen}"
    ):
        sft_text(tmp_path, template, {"messages": TALK}, {"messages": [ASKED | {"content": [part]}, GOOD]})


# Keys


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prefix", True),
        ("train", False),
        ("images", ["a.png"]),
        ("name", "Ada"),
        ("reasoning_content", "Hm."),
        ("function_call", {"name": "f"}),
    ],
)
def test_a_key_that_the_template_does_not_read_is_refused_by_row(
    tmp_path: Path, key: str, value: Any
) -> None:
    with pytest.raises(
        DataError,
        match=rf"a\.jsonl, row 2: column 'messages' has messages with the key '{key}', which the chat template of",
    ):
        sft_text(tmp_path, CHATML, {"messages": TALK}, {"messages": [ASKED, GOOD | {key: value}]})
    reading = CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}{{ m." + key + " }}")
    assert sft_text(tmp_path, reading, {"messages": [ASKED, GOOD | {key: value}]}) == [
        chatml(("user", "What is it?"), ("assistant", f"Great.{value}"))
    ]


def test_labels_of_messages_and_empty_or_null_keys_are_no_meaning(tmp_path: Path) -> None:
    labelled = [
        ASKED | {"id": 3, "name": None},
        GOOD | {"tool_calls": [], "reasoning_content": "", "refusal": None},
    ]
    assert sft_text(tmp_path, CHATML, {"messages": labelled}) == [
        chatml(("user", "What is it?"), ("assistant", "Great."))
    ]


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("read", ["reasoning_content", "thinking"])
def test_reasoning_reaches_the_template_under_the_name_that_it_reads(
    tmp_path: Path, key: str, read: str
) -> None:
    template = CHATML.replace(
        "{{ m['content'] }}", "{% if m." + read + " %}({{ m." + read + " }}){% endif %}{{ m['content'] }}"
    )
    assert sft_text(tmp_path, template, {"messages": [ASKED, GOOD | {key: "Hm."}]}) == [
        chatml(("user", "What is it?"), ("assistant", "(Hm.)Great."))
    ]


@pytest.mark.parametrize(
    ("source", "read", "unread"),
    [
        (CHATML, "role content", "name tool_calls weight"),
        (
            "{% for m in messages[1:] %}{% for c in m.tool_calls %}{{ c.name }}{% endfor %}{% endfor %}",
            "tool_calls",
            "name content",
        ),
        (
            "{% set ns = namespace(m=messages[0]) %}{{ ns.m['a'] }}{% set ns.x = messages | last %}{{ ns.x.b }}",
            "a b",
            "c",
        ),
        (
            "{% macro say(q) %}{{ q.get('a') }}{% if 'b' in q %}{% endif %}{% endmacro %}{{ say(messages[-1]) }}",
            "a b",
            "c",
        ),
        ("{{ messages | selectattr('a', 'true') | map(attribute='b') | join }}", "a b", "c"),
        (
            "{% for m in messages | reverse %}{{ loop.previtem.a }}{{ m.b if m.b else '' }}{% endfor %}",
            "a b",
            "c",
        ),
        (
            "{% set rest = messages[1:] if messages[0].a else messages %}{% for m in rest %}{{ m.b }}{% endfor %}",
            "a b",
            "c",
        ),
        ("{% for m in messages %}{{ m | tojson }}{% endfor %}", "a b c", ""),
        ("{% for m in messages %}{% for key in m %}{{ m[key] }}{% endfor %}{% endfor %}", "a b c", ""),
        ("{{ messages }}", "a b c", ""),
    ],
)
def test_the_keys_that_a_template_reads_are_found_in_its_source(source: str, read: str, unread: str) -> None:
    keys = TemplateKeys(source)
    assert [key for key in read.split() if not keys.reads(key)] == []
    assert [key for key in unread.split() if keys.reads(key)] == []


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
        ("{", "holds a text that is not JSON: '{'"),
        ([3], r"must hold 'tool_calls' that are a list of objects, got \[3\]"),
        (call("x")["tool_calls"], "holds a text that is not JSON: 'x'"),
        (call("[1]")["tool_calls"], r"must hold 'arguments' of calls that are an object, got \[1\]"),
        (call(3)["tool_calls"], "must hold 'arguments' of calls that are an object, got 3"),
    ],
)
def test_junk_in_calls_is_refused_by_row(tmp_path: Path, calls: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"a\.jsonl, row 2: column 'messages' {message}"):
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
        ("junk", "column 'tools' holds a text that is not JSON: 'junk'"),
        (3, "column 'tools' must be a list of schemas, got int"),
        ({"name": "f"}, "column 'tools' must be a list of schemas, got dict"),
        ([3], "column 'tools' must hold schemas, which are objects; got 3"),
        (["junk"], "column 'tools' holds a text that is not JSON: 'junk'"),
        ([{}], r"column 'tools' must hold schemas, which are objects; got \{\}"),
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
        DataError, match=r"row 1: column 'tools' has schemas, and the chat template of .* does not read tools"
    ):
        sft_text(tmp_path, CHATML, {"messages": TALK, "tools": [{"name": "f"}]})
    with pytest.raises(
        DataError, match="row 1: column 'tools' is for messages, and a text goes through no chat template"
    ):
        sft_text(tmp_path, CHATML, {"prompt": "a", "completion": "b", "tools": [{"name": "f"}]})


@pytest.mark.parametrize(
    ("column", "value"),
    [("images", ["a.png"]), ("documents", [{"text": "It rained."}]), ("system", "Be brief.")],
)
def test_a_column_that_would_change_what_the_model_sees_is_refused(
    tmp_path: Path, column: str, value: Any
) -> None:
    with pytest.raises(DataError, match=f"row 1: column '{column}' is not served"):
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
    with pytest.raises(DataError, match=r"row 1: the chat templates of .* have none for it: .*\['rag'\]"):
        sft_text(tmp_path, {"rag": CHATML}, {"messages": TALK})


# Weights


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_a_turn_of_weight_0_is_not_trained(tmp_path: Path, template: str) -> None:
    row = {
        "messages": [
            ASKED,
            BAD | {"weight": 0},
            ASKED | {"weight": 0},
            GOOD | {"weight": 1},
            ASKED,
            GOOD | {"weight": None},
        ]
    }
    untrained = chatml(("assistant", "Bad.")).replace("|Bad.<|im_end|>|", "Bad.<|im_end|>")
    ask = ("user", "What is it?")
    expected = chatml(ask) + untrained + chatml(ask, ("assistant", "Great."), ask, ("assistant", "Great."))
    assert sft_text(tmp_path, template, row) == [expected]


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        (GOOD | {"weight": 0.5}, "must have a 'weight' of 0 or 1, got 0.5"),
        (GOOD | {"weight": True}, "must have a 'weight' of 0 or 1, got True"),
        (GOOD | {"weight": "0"}, "must have a 'weight' of 0 or 1, got '0'"),
        (GOOD | {"weight": 0}, "has assistant turns of weight 0 only"),
        (ASKED | {"weight": 1}, "has a 'weight' of 1 on a turn of role 'user'"),
    ],
)
def test_other_weights_are_refused_by_row(tmp_path: Path, message: Any, fault: str) -> None:
    talk = [message, GOOD] if message["role"] == "user" else [ASKED, message]
    with pytest.raises(DataError, match=rf"a\.jsonl, row 2: column 'messages' {fault}"):
        sft_text(tmp_path, CHATML, {"messages": TALK}, {"messages": talk})


# Where the prompt ends


SYSTEM = {"role": "system", "content": "Be short."}


@pytest.mark.parametrize("prompt", [[ASKED], [SYSTEM, ASKED], [ASKED, BAD, ASKED]])
def test_a_prompt_that_the_answers_repeat_is_cut(tmp_path: Path, prompt: list[Any]) -> None:
    tokenizer = build(CHATML)
    pair = {"prompt": prompt, "chosen": [GOOD], "rejected": [BAD]}
    whole = {"prompt": prompt, "chosen": [*prompt, GOOD], "rejected": [*prompt, BAD | {"name": None}]}
    one, other = tokenize_pairs(rows_of(tmp_path, pair, whole), tokenizer, max_length=512)
    assert one == other and trained_text(tokenizer, one.chosen) == "Great.<|im_end|>"
    rows = [{"prompt": prompt, "completion": answer, "label": True} for answer in ([GOOD], [*prompt, GOOD])]
    first, second = tokenize_unpaired(rows_of(tmp_path, *rows), tokenizer, max_length=512)
    assert first == second == first._replace(answered=one.chosen)
    assert tokenize_sft(rows_of(tmp_path, *rows), tokenizer, max_length=512) == [one.chosen, one.chosen]


@pytest.mark.parametrize(
    "answer", [[ASKED, GOOD], [SYSTEM, GOOD], [{"role": "user", "content": "Another?"}, GOOD]]
)
def test_an_answer_that_repeats_a_part_of_its_prompt_is_refused_by_row(
    tmp_path: Path, answer: list[Any]
) -> None:
    rows = rows_of(
        tmp_path,
        {"prompt": [ASKED], "completion": [GOOD]},
        {"prompt": [{"role": "system", "content": "Hm."}, ASKED], "completion": answer},
    )
    with pytest.raises(
        DataError,
        match=r"row 2: column 'completion' begins with a turn of role '(user|system)' where column 'prompt' ends in",
    ):
        tokenize_sft(rows, build(CHATML), max_length=512)


def test_a_text_prompt_beside_whole_conversations_is_where_they_part(tmp_path: Path) -> None:
    tokenizer = build(CHATML)
    asked = {"prompt": ASKED["content"], "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}
    later = {
        "prompt": ASKED["content"],
        "chosen": [ASKED, BAD, ASKED, GOOD],
        "rejected": [ASKED, BAD, ASKED, BAD],
    }
    plain = [{"chosen": row["chosen"], "rejected": row["rejected"]} for row in (asked, later)]
    pairs = tokenize_pairs(rows_of(tmp_path, asked, later), tokenizer, max_length=512)
    assert pairs == tokenize_pairs(rows_of(tmp_path, *plain), tokenizer, max_length=512)
    [sequence] = tokenize_sft(
        rows_of(tmp_path, {"prompt": "What is it?\n", "completion": TALK}), tokenizer, max_length=512
    )
    assert sequence == pairs[0].chosen
    for row, message in (
        (
            asked | {"prompt": "Why?"},
            "must hold whole conversations with the text of column 'prompt' as a user's turn, and an answer",
        ),
        (
            asked | {"rejected": [SYSTEM, ASKED, BAD]},
            "must begin with the same messages up to the text of column 'prompt'",
        ),
        (asked | {"prompt": None}, "column 'prompt' must be a list of messages, or a text, got NoneType"),
    ):
        with pytest.raises(DataError, match=f"row 2: .*{message}"):
            tokenize_pairs(rows_of(tmp_path, asked, row), tokenizer, max_length=512)


def test_sharegpt_conversations_are_read_as_messages(tmp_path: Path) -> None:
    told = [
        {"from": "system", "value": "Be short."},
        {"from": "human", "value": "What is it?"},
        {"from": "gpt", "value": "Great.", "weight": None},
    ]
    [text, same] = sft_text(tmp_path, CHATML, {"conversations": told}, {"conversations": [SYSTEM, *TALK]})
    assert text == same == chatml(("system", "Be short."), ("user", "What is it?"), ("assistant", "Great."))
    for bad, message in (
        (
            {"from": "observation", "value": "x"},
            "must hold messages from human, user, gpt, .*; got 'observation'",
        ),
        ({"value": "x"}, "must hold messages with a 'from' and a 'value', got the keys value"),
    ):
        with pytest.raises(DataError, match=f"row 2: column 'conversations' {message}"):
            sft_text(tmp_path, CHATML, {"conversations": told}, {"conversations": [*told, bad]})
    with pytest.raises(
        DataError,
        match="row 1: column 'chosen' must hold .*, got the keys from, value; rename ShareGPT's 'from' and 'value'",
    ):
        tokenize_pairs(
            rows_of(tmp_path, {"prompt": [ASKED], "chosen": told, "rejected": told[:1]}),
            build(CHATML),
            max_length=64,
        )
    with pytest.raises(DataError, match=r"no column 'prompt'; there are: conversations; .*fastalign sft"):
        tokenize_prompts(rows_of(tmp_path, {"conversations": told}), build(CHATML), max_length=64)


# Ends of turns


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (CHATML, ["<|im_end|>"]),
        (MARKED, ["<|im_end|>"]),
        (CHATML.replace("<|im_end|>", "<|bos|>"), ["<|bos|>"]),
        (
            CHATML.replace(
                "<|im_end|>",
                "{% if m.tool_calls %}{{ m.tool_calls }}<|im_start|>{% else %}<|im_end|>{% endif %}",
            ),
            ["<|im_end|>", "<|im_start|>"],
        ),
        (CHATML.replace("<|im_end|>", ""), []),
        (MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"), []),
        ("{{ 1 / 0 }}", []),
    ],
)
def test_the_special_tokens_that_end_a_trained_turn_are_found(template: str, ends: list[str]) -> None:
    tokenizer = build(template, bos=True)
    assert ChatTemplate(tokenizer).turn_ends() == sorted(tokenizer.convert_tokens_to_ids(ends))
    assert turn_ends(Dataset.from_dict({"prompt": ["a"], "completion": ["b"]}), tokenizer) == []


# Lengths


def tokens(folder: Path, template: str, rows: Sequence[Any], **options: Any) -> list[int]:
    """The lengths of what is left of rows, in all kinds of them."""
    read = rows_of(folder, *rows)
    tokenizer = build(template)
    if "text" in rows[0]:
        return [len(row.input_ids) for row in tokenize_text(read, tokenizer, **options)]
    if "label" in rows[0]:
        return [len(row.answered.input_ids) for row in tokenize_unpaired(read, tokenizer, **options)]
    if "chosen" in rows[0]:
        return [len(row.chosen.input_ids) for row in tokenize_pairs(read, tokenizer, **options)]
    if "completion" in rows[0]:
        return [len(row.input_ids) for row in tokenize_sft(read, tokenizer, **options)]
    return [len(row.input_ids) for row in tokenize_prompts(read, tokenizer, **options)]


LONG = " film" * 20
KINDS: dict[str, dict[str, Any]] = {
    "sft": {"prompt": "The", "completion": LONG},
    "pairs": {"prompt": "The", "chosen": LONG, "rejected": " bad"},
    "unpaired": {"prompt": "The", "completion": LONG, "label": True},
    "prompts": {"prompt": LONG},
    "text": {"text": LONG},
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_too_long_are_refused_left_out_or_cut_and_counted(tmp_path: Path, kind: str) -> None:
    long = KINDS[kind]
    short = {name: " film" if value == LONG else value for name, value in long.items()}
    limit = {"prompts": "max_prompt_length=8", "text": "sequence_length=8"}.get(kind, "max_length=8")
    side = "left" if kind == "prompts" else "right"
    rows = [short, long, short]
    with pytest.raises(
        DataError,
        match=rf"a\.jsonl, row 2: longer than {limit} \(too_long=refuse; drop leaves such rows out, truncate cuts them\)$",
    ):
        tokens(tmp_path, CHATML, rows, max_length=8, too_long="refuse")
    with pytest.warns(UserWarning, match=rf"a\.jsonl, row 2: longer than {limit}, left out \(1 of 3 rows\)$"):
        left = tokens(tmp_path, CHATML, rows, max_length=8, too_long="drop")
    assert len(left) == 2 and max(left) < 8
    with pytest.warns(
        UserWarning, match=rf"a\.jsonl, row 2: longer than {limit}, cut at the {side} \(1 of 3 rows\)$"
    ):
        assert tokens(tmp_path, CHATML, rows, max_length=8, too_long="truncate") == [left[0], 8, left[1]]
    with pytest.raises(DataError, match=rf"rows 1, 2: longer than {limit}, and so are all$"):
        tokens(tmp_path, CHATML, [long, long], max_length=8, too_long="drop")


def test_a_prompt_that_is_cut_keeps_its_end(tmp_path: Path) -> None:
    tokenizer = build(CHATML)
    rows = rows_of(tmp_path, {"prompt": [{"role": "user", "content": LONG}]})
    [whole] = tokenize_prompts(rows, tokenizer, max_length=512)
    with pytest.warns(UserWarning, match="cut at the left"):
        [cut] = tokenize_prompts(rows, tokenizer, max_length=8, too_long="truncate")
    assert cut.input_ids == whole.input_ids[-8:]


# Templates that fail


def row_of(template: str, content: str = "bad") -> list[Tokenized]:
    talk = [ASKED | {"content": content}, GOOD]
    return tokenize_sft(
        Dataset.from_list([{"messages": TALK}, {"messages": talk}]), build(template), max_length=64
    )


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("{{ 1 / 0 }}", "refuses it: ZeroDivisionError: division by zero"),
        ("{{ 1 % (messages | length - 2) }}", "refuses it: ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses it: RecursionError"),
        ("{{ raise_exception('not this one') }}", "refuses it: not this one"),
        ("{{ messages['x']['y'] }}", "refuses it: "),
        ("{{ [] | first + 3 }}", "refuses it: "),
        ("{{ range(10 ** 9) | list }}", "refuses it: OverflowError: Range too big"),
        ("{{ 'x' * 10 ** 11 }}", "refuses it: MemoryError"),
        ("{{ 'x' | int('x') + 1 }}", "refuses it: TypeError"),
    ],
)
def test_a_template_that_fails_is_an_error_of_the_row(fault: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"^row 2: the chat template of .* {message}"):
        row_of("{% if messages[0]['content'] == 'bad' %}" + fault + "{% endif %}" + CHATML)


@pytest.mark.parametrize(
    ("fault", "row"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% if i + j < 0 %}x{% endif %}{% endfor %}{% endfor %}",
            2,
        ),
        (
            "{{ 9 ** (9 ** (7 + messages | length)) }}",
            2,
        ),  # one operation of C, which no signal handler of Python would interrupt
        ("{{ 9 ** (9 ** 9) }}", 1),  # which Jinja computes when it reads the template
    ],
)
def test_a_template_that_computes_for_minutes_ends_within_seconds_and_the_next_one_works(
    monkeypatch: pytest.MonkeyPatch, fault: str, row: int
) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 0.5)
    with pytest.raises(
        DataError, match=rf"^row {row}: the chat template of .* takes more than 0\.5 s of processor time$"
    ):
        row_of("{% if messages[0]['content'] == 'bad' %}" + fault + "{% endif %}" + CHATML)
    assert len(row_of(CHATML)) == 2


# Ways out of Jinja's sandbox that are known; each tries to write a file.
WRITE = "open('{path}', 'w').close()"
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''.__class__.__base__.__subclasses__() | map(attribute='__init__.__globals__') | list }}",
    "{{ cycler.__init__.__globals__.os.system('touch {path}') }}",
    "{{ joiner.__init__.__globals__['__builtins__']['open']('{path}', 'w') }}",
    "{{ namespace.__init__.__globals__['__builtins__']['exec'](\"{write}\") }}",
    "{{ raise_exception.__globals__['__builtins__']['exec'](\"{write}\") }}",
    "{{ strftime_now.__globals__['__builtins__'].open('{path}', 'w') }}",
    "{{ self.__init__.__globals__.__builtins__.open('{path}', 'w') }}",
    "{{ (messages | attr('__class__')).__mro__ | last | attr('__subclasses__')() }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages[0]) }}",
    "{{ ('{0.__class__.__mro__}' | attr('format'))(messages) }}",
    "{{ lipsum.__globals__['os'].popen('touch {path}').read() }}",
    "{% set f = messages.__class__.append %}{{ f(messages, 1) }}{{ messages.append({'role': 'user'}) }}",
    "{% import 'os' as os %}{{ os.system('touch {path}') }}",
    "{% include '/etc/passwd' %}",
]


@pytest.mark.parametrize("escape", ESCAPES)
def test_the_sandbox_holds(tmp_path: Path, escape: str) -> None:
    path = tmp_path / "escaped"
    template = escape.replace("{write}", WRITE).replace("{path}", str(path)) + CHATML
    with pytest.raises(DataError, match=r"^rows 1, 2: the chat template of .* refuses it: "):
        row_of(template)
    assert not path.exists()


def test_unreadable_templates_are_refused() -> None:
    with pytest.raises(
        DataError, match="rows 1, 2: the chat template of .* refuses it: .*unknown tag 'nothing'"
    ):
        row_of("{% nothing %}" + HEADER + PROMPT)
