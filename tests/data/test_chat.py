"""What a row of messages means: parts, keys, labels, reasoning, weights."""

from pathlib import Path
from typing import Any

import pytest

from fastalign.data import DataError
from fastalign.data.chat_template.template_keys import TemplateKeys
from tests.data.chats import CHATML, MARKED
from tests.data.messages import ASKED, BAD, GOOD, TALK, chatml, sft_text

# As Llama 3.2 Vision, SmolVLM and others.
PARTS = CHATML.replace(
    "{{ m['content'] }}",
    "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}",
)


EITHER = CHATML.replace(
    "{{ m['content'] }}",
    (
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endif %}"
    ),
)


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
    with pytest.raises(DataError, match=rf"a\.jsonl, row 2: column 'messages': got a part .*{seen}"):
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
        match=(
            rf"a\.jsonl, row 2: column 'messages': got messages with the key '{key}', "
            "expected none that the chat template of .* does not read"
        ),
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
            (
                "{% set ns = namespace(m=messages[0]) %}{{ ns.m['a'] }}"
                "{% set ns.x = messages | last %}{{ ns.x.b }}"
            ),
            "a b",
            "c",
        ),
        (
            (
                "{% macro say(q) %}{{ q.get('a') }}{% if 'b' in q %}{% endif %}"
                "{% endmacro %}{{ say(messages[-1]) }}"
            ),
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
            (
                "{% set rest = messages[1:] if messages[0].a else messages %}"
                "{% for m in rest %}{{ m.b }}{% endfor %}"
            ),
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
        (GOOD | {"weight": 0.5}, "got a 'weight' of 0.5, expected 0 or 1"),
        (GOOD | {"weight": True}, "got a 'weight' of True, expected 0 or 1"),
        (GOOD | {"weight": "0"}, "got a 'weight' of '0', expected 0 or 1"),
        (GOOD | {"weight": 0}, "got only assistant turns of weight 0"),
        (ASKED | {"weight": 1}, "got a 'weight' of 1 on a turn of role 'user'"),
    ],
)
def test_other_weights_are_refused_by_row(tmp_path: Path, message: Any, fault: str) -> None:
    talk = [message, GOOD] if message["role"] == "user" else [ASKED, message]
    with pytest.raises(DataError, match=rf"a\.jsonl, row 2: column 'messages': {fault}"):
        sft_text(tmp_path, CHATML, {"messages": TALK}, {"messages": talk})
