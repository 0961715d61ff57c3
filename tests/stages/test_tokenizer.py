"""The command `fastalign tokenizer`: what it trains reads any text, and conversations."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from fastalign.data import DataError, load_rows, tokenize_sft, tokenize_text
from fastalign.stages import tokenizer
from tests.stages.tiny import sentence, write


@pytest.fixture
def train_data(tmp_path: Path) -> str:
    return write(tmp_path / "text.jsonl", [{"text": sentence(number)} for number in range(40)])


def train(train_data: str, folder: Path, **changes: Any) -> Any:
    tokenizer.run(tokenizer.TokenizerConfig(train_data=train_data, output_dir=str(folder), **changes))
    return AutoTokenizer.from_pretrained(folder)


def test_any_text_comes_back_and_a_document_ends_with_eos(train_data: str, tmp_path: Path) -> None:
    made = train(train_data, tmp_path / "made", vocab_size=300)
    assert len(made) == 300
    text = "Touché, 2 films – \n\tnever <user>"
    assert made.decode(made.encode(text, add_special_tokens=False)) == text
    [document, *_] = tokenize_text(load_rows(train_data), made, max_length=200)
    assert document.input_ids[0] == made.bos_token_id and document.input_ids[-1] == made.eos_token_id
    assert made.pad_token_id not in (made.eos_token_id, None)


def test_conversations_are_read_turn_by_turn_and_only_answers_are_trained(
    train_data: str, tmp_path: Path
) -> None:
    made = train(train_data, tmp_path / "made", vocab_size=300)
    turns = [
        {"role": role, "content": f"{role} says"}
        for role in ("system", "user", "assistant", "user", "assistant")
    ]
    [row] = tokenize_sft(
        load_rows(write(tmp_path / "chats.jsonl", [{"messages": turns}])), made, max_length=200
    )
    assert made.decode(row.input_ids) == (
        "<s><|system|>system says</s>" + 2 * "<|user|>user says</s><|assistant|>assistant says</s>"
    )
    trained = [token for token, train in zip(row.input_ids, row.trained, strict=True) if train]
    assert made.decode(trained) == "assistant says</s>" * 2
    prompt = made.apply_chat_template(turns[:2], add_generation_prompt=True, tokenize=False)
    assert prompt == "<s><|system|>system says</s><|user|>user says</s><|assistant|>"


def test_what_the_template_has_no_place_for_is_refused(train_data: str, tmp_path: Path) -> None:
    made = train(train_data, tmp_path / "made", vocab_size=300)
    turns = [{"role": "tool", "content": "4"}, {"role": "assistant", "content": "four"}]
    with pytest.raises(DataError, match="takes turns of system, user and assistant without tool calls"):
        tokenize_sft(load_rows(write(tmp_path / "chats.jsonl", [{"messages": turns}])), made, max_length=200)


def test_a_text_with_too_few_pairs_is_said(
    train_data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = train(train_data, tmp_path / "made")
    assert (
        f"a tokenizer of {len(made)} tokens (vocab_size=8192, but the text has no more pairs to merge), "
        "from 40 rows" in capsys.readouterr().out
    )


def test_a_folder_with_files_and_wrong_rows_are_refused(train_data: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="output_dir: got '.*', which holds files, expected a new or empty folder"
    ):
        train(train_data, tmp_path)
    with pytest.raises(DataError, match="columns: got text, expected 'txt' too"):
        train(train_data, tmp_path / "made", text_column="txt")
    with pytest.raises(ValueError, match="vocab_size"):
        train(train_data, tmp_path / "made", vocab_size=100)
