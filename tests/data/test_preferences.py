"""Rows of preferences: what is refused, what is scored, and who meets whom."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    PreTrainedTokenizerFast,
)

from fastalign.data import (
    DataError,
    Tokenized,
    Unpaired,
    load_rows,
    mismatch,
    preference_pairs,
    tokenize_pairs,
    tokenize_unpaired,
)
from tests.data.preferences import random_sequences

CORPUS = [
    "The film was great, really great.",
    "What did you think of the film? It was bad.",
    "user assistant",
]


HEADER = "<|im_start|>{{ m['role'] }}\n"


CHATML = (
    "{% for m in messages %}" + HEADER + "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


ASKED = [{"role": "user", "content": "What did you think of the film?"}]


GOOD, BAD = ([{"role": "assistant", "content": text}] for text in ("It was great.", "It was bad, really."))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        CORPUS * 10,
        vocab_size=320,
        special_tokens=["<|im_end|>", "<|im_start|>", "<pad>"],
        show_progress=False,
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|im_end|>", pad_token="<pad>", chat_template=CHATML
    )


def write(path: Path, rows: Sequence[Any]) -> Dataset:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_rows(str(path))


def scored(tokenizer: PreTrainedTokenizerFast, sequence: Tokenized) -> str:
    return str(tokenizer.decode([token for token, train in zip(*sequence, strict=True) if train]))


# Pairs


def test_the_completions_of_a_text_pair_are_scored_with_their_eos(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = write(
        tmp_path / "a.jsonl", [{"prompt": "The film", "chosen": " was great.", "rejected": " was bad."}]
    )
    [pair] = tokenize_pairs(rows, tokenizer, max_length=64)
    assert pair.margin is None
    assert tokenizer.decode(pair.chosen.input_ids) == "The film was great.<|im_end|>"
    assert [scored(tokenizer, one) for one in pair[:2]] == [" was great.<|im_end|>", " was bad.<|im_end|>"]


@pytest.mark.parametrize("implicit", [False, True])
def test_the_turns_of_a_conversational_pair_are_scored_with_their_end(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, implicit: bool
) -> None:
    row: dict[str, Any] = {"prompt": ASKED, "chosen": GOOD, "rejected": BAD}
    if implicit:
        row = {"chosen": ASKED + GOOD, "rejected": ASKED + BAD}
    [pair] = tokenize_pairs(write(tmp_path / "a.jsonl", [row]), tokenizer, max_length=64)
    assert pair.chosen.input_ids == tokenizer.apply_chat_template(ASKED + GOOD, return_dict=False)
    assert [scored(tokenizer, one) for one in pair[:2]] == [
        "It was great.<|im_end|>",
        "It was bad, really.<|im_end|>",
    ]


def test_margins_come_along_from_jsonl_and_parquet(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "margin": margin} for margin in (1.0, -0.5, 2.0)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for read in (write(tmp_path / "a.jsonl", rows), load_rows(str(tmp_path / "a.parquet"))):
        assert [pair.margin for pair in tokenize_pairs(read, tokenizer, max_length=8)] == [1.0, -0.5, 2.0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "chosen": "b"}], "a.jsonl: columns: got prompt, chosen, expected 'rejected' too$"),
        (
            [{"chosen": "b", "rejected": "c"}],
            "a.jsonl: columns: got chosen, rejected, expected 'prompt' too$",
        ),
        (
            [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "", "rejected": "c"}],
            "row 2: column 'chosen': got an empty text, expected one that is not$",
        ),
        (
            [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b"}],
            "row 2: column 'rejected': got null or no such column, expected text$",
        ),
        ([{"prompt": "a", "chosen": "b", "rejected": 3}], "row 1: column 'rejected': got int, expected text"),
        (
            [{"prompt": "a", "chosen": "b", "rejected": "b"}] * 2,
            "rows 1, 2: columns 'chosen' and 'rejected': got the same answer, expected different ones$",
        ),
        (
            [{"prompt": ASKED, "chosen": GOOD, "rejected": "b"}],
            "row 1: column 'rejected': got str, expected a list of messages",
        ),
        (
            [{"prompt": ASKED, "chosen": GOOD, "rejected": GOOD}],
            "row 1: columns 'chosen' and 'rejected': got the same answer, expected different ones$",
        ),
        (
            [{"prompt": ASKED, "chosen": GOOD, "rejected": ASKED}],
            "row 1: column 'rejected': got no assistant turn, expected at least one$",
        ),
        (
            [{"chosen": GOOD, "rejected": BAD}],
            "row 1: columns 'chosen' and 'rejected': got no shared first messages",
        ),
        (
            [{"chosen": GOOD, "rejected": "b"}],
            "row 1: columns 'chosen' and 'rejected': got a text, expected lists of messages",
        ),
        (
            [{"chosen": ASKED + GOOD, "rejected": ASKED}],
            "row 1: column 'rejected': got no assistant turn, expected at least one$",
        ),
        (
            [{"prompt": "a", "chosen": "b", "rejected": "c", "margin": m} for m in (1, "high")],
            "row 2: column 'margin': got 'high', expected ",
        ),
        (
            [{"prompt": "a", "chosen": "b", "rejected": "c", "margin": m} for m in (1, None)],
            "row 2: column 'margin': got None, expected ",
        ),
        (
            [{"prompt": "a", "chosen": "b", "rejected": "c", "margin": True}],
            "row 1: column 'margin': got True, expected a finite number",
        ),
    ],
)
def test_pairs_that_cannot_be_used_are_refused_by_row(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, rows: list[Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        tokenize_pairs(write(tmp_path / "a.jsonl", rows), tokenizer, max_length=64)


def test_long_pairs_are_cut_with_one_warning_and_refused_where_nothing_is_left_to_compare(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    short = {"prompt": "The film", "chosen": " was", "rejected": " bad"}
    long = {"prompt": "The film", "chosen": " was great." * 9, "rejected": " bad" * 40}
    rows = write(tmp_path / "a.jsonl", [short, long])
    with pytest.warns(
        UserWarning, match=r"a\.jsonl, row 2: longer than max_length=12, cut at the right \(1 of 2 rows\)"
    ) as caught:
        pairs = tokenize_pairs(rows, tokenizer, max_length=12, too_long="truncate")
    assert len(caught) == 1
    assert [len(sequence.input_ids) for sequence in pairs[1][:2]] == [12, 12]
    same_at_first = {
        "prompt": "The film",
        "chosen": " was great." * 9,
        "rejected": " was great." * 9 + " bad",
    }
    with (
        pytest.raises(
            DataError, match="row 2: columns 'chosen' and 'rejected' are the same within max_length=12$"
        ),
        pytest.warns(UserWarning),
    ):
        tokenize_pairs(
            write(tmp_path / "b.jsonl", [short, same_at_first]), tokenizer, max_length=12, too_long="truncate"
        )
    with pytest.raises(
        DataError, match="row 2: no token to train on within max_length=12: the prompt fills it$"
    ):
        tokenize_pairs(
            write(tmp_path / "c.jsonl", [short, short | {"prompt": "The film was great." * 9}]),
            tokenizer,
            max_length=12,
            too_long="truncate",
        )


# Judged completions


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"prompt": "a", "completion": "b"}],
            "a.jsonl: columns: got prompt, completion, expected 'label' too$",
        ),
        (
            [{"prompt": "a", "completion": "b", "label": label} for label in (True, 1)],
            "row 2: column 'label': got 1, expected true or false",
        ),
        (
            [{"prompt": "a", "completion": "b", "label": label} for label in (False, None)],
            "row 2: column 'label': got None, expected ",
        ),
        (
            [{"prompt": "a", "completion": " ", "label": True}],
            "row 1: column 'completion': got an empty text, expected one that is not$",
        ),
    ],
)
def test_judged_completions_that_cannot_be_used_are_refused_by_row(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, rows: list[Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        tokenize_unpaired(write(tmp_path / "a.jsonl", rows), tokenizer, max_length=64)


@pytest.mark.parametrize("chat", [False, True])
def test_a_judged_completion_is_told_from_its_prompt(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, chat: bool
) -> None:
    row = (
        {"prompt": ASKED, "completion": GOOD} if chat else {"prompt": "The film", "completion": " was great."}
    )
    [read] = tokenize_unpaired(
        write(tmp_path / "a.jsonl", [row | {"label": False}]), tokenizer, max_length=64
    )
    assert not read.desirable and read.mismatched is None
    prompt = (
        tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False)
        if chat
        else tokenizer("The film")["input_ids"]
    )
    assert read.prompt == prompt
    assert tokenizer.decode(read.completion) == (
        "It was great.<|im_end|>\n" if chat else " was great.<|im_end|>"
    )


def unpaired(completions: Sequence[int]) -> list[Unpaired]:
    """Rows whose completions are the given token, four times, behind prompts that differ."""
    return [
        Unpaired(Tokenized([100 + n, 7] + [token] * 4, [False] * 2 + [True] * 4), n % 2 == 0)
        for n, token in enumerate(completions)
    ]


@pytest.mark.parametrize(
    "completions", [[1, 2], [1, 2, 3, 4, 5, 6, 7], [1, 1, 2, 2, 3, 3], [1, 1, 1, 1, 2], [1, 1, 1, 2, 2, 3]]
)
def test_no_row_meets_its_own_completion_or_an_equal_one(completions: list[int]) -> None:
    rows = unpaired(completions)
    seen = set()
    for step in range(40):
        met = mismatch(rows, seed=1, step=step, max_length=64)
        assert met == mismatch(rows, seed=1, step=step, max_length=64)
        tokens = []
        for row, new in zip(rows, met, strict=True):
            assert new._replace(mismatched=None) == row and new.mismatched is not None
            assert new.mismatched.trained == row.answered.trained
            assert new.mismatched.input_ids[:2] == row.prompt
            assert new.mismatched.input_ids[2:] != list(row.completion)
            tokens.append(new.mismatched.input_ids[2])
        if max(map(completions.count, completions)) * 2 <= len(completions):
            assert sorted(tokens) == sorted(completions), "each completion must be met once"
        seen.add(tuple(tokens))
    assert len(seen) > 1 or len(set(completions)) == 2


def test_a_mismatched_sequence_is_cut_and_one_completion_alone_is_refused() -> None:
    rows = unpaired([1, 2, 3])
    for row in mismatch(rows, seed=0, step=0, max_length=4):
        assert (
            row.mismatched is not None
            and len(row.mismatched.input_ids) == 4
            and row.mismatched.trained == [False, False, True, True]
        )
    for alone in (rows[:1], unpaired([1, 1])):
        with pytest.raises(ValueError, match=f"rows: got {len(alone)} with the same completion"):
            mismatch(alone, seed=0, step=0, max_length=64)


def test_the_longest_mismatch_bounds_every_mismatch() -> None:
    sequences = random_sequences([4, 9, 17, 30, 12])
    rows = [Unpaired(sequence, True) for sequence in sequences]
    longest = preference_pairs.mismatch_bounds(rows, max_length=64)[1]
    found = [
        len(row.mismatched.input_ids)
        for step in range(30)
        for row in mismatch(rows, seed=0, step=step, max_length=64)
        if row.mismatched
    ]
    assert len(longest.input_ids) == 30 and max(found) <= 30
    assert len(preference_pairs.mismatch_bounds(rows, max_length=20)[1].input_ids) == 20
