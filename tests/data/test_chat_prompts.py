"""Where a prompt ends and an answer begins, ShareGPT rows, and rows that are too long."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from fastalign.data import (
    DataError,
    tokenize_pairs,
    tokenize_prompts,
    tokenize_sft,
    tokenize_text,
    tokenize_unpaired,
    turn_ends,
)
from fastalign.data.chat_template.trained_spans import ChatTemplate
from tests.data.chats import CHATML, MARKED, build, trained_text
from tests.data.messages import ASKED, BAD, GOOD, TALK, chatml, rows_of, sft_text

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
        match=(
            r"row 2: column 'completion': got a first turn of role '(user|system)' "
            r"after a prompt that ends in one of role 'user'"
        ),
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
            "columns 'chosen' and 'rejected': got no user's turn with the text of column 'prompt'",
        ),
        (
            asked | {"rejected": [SYSTEM, ASKED, BAD]},
            "columns 'chosen' and 'rejected': got conversations that differ before the answer",
        ),
        (asked | {"prompt": None}, "column 'prompt': got NoneType, expected a list of messages, or a text"),
    ):
        with pytest.raises(DataError, match=f"row 2: {message}"):
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
            "got a message from 'observation', expected human, user, gpt, ",
        ),
        ({"value": "x"}, "got the keys value, expected messages with a 'from' and a 'value'"),
    ):
        with pytest.raises(DataError, match=f"row 2: column 'conversations': {message}"):
            sft_text(tmp_path, CHATML, {"conversations": told}, {"conversations": [*told, bad]})
    with pytest.raises(
        DataError,
        match=(
            "row 1: column 'chosen': got the keys from, value, expected .*; "
            "rename ShareGPT's 'from' and 'value'"
        ),
    ):
        tokenize_pairs(
            rows_of(tmp_path, {"prompt": [ASKED], "chosen": told, "rejected": told[:1]}),
            build(CHATML),
            max_length=64,
        )
    with pytest.raises(
        DataError, match=r"columns: got conversations, expected 'prompt' too; .*fastalign sft"
    ):
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
        match=(
            rf"a\.jsonl, row 2: longer than {limit} "
            r"\(too_long=refuse; drop leaves such rows out, truncate cuts them\)$"
        ),
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
