"""The demo's sentences: where they come from, how they are split, and the rows made of them."""

import hashlib
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from fastalign import data
from fastalign.demo import sentences
from fastalign.demo.sentences import CHAT_TEMPLATE, Sample, Sentence, cut, fetch, read_sentences, split
from fastalign.stages.tokenizer import train_tokenizer
from tests.demo.sentences import SENTENCES, archive_of, lines_of


def test_sentences_are_read_from_the_archive_and_from_the_file_in_it(tmp_path: Path) -> None:
    archive = archive_of(lines_of(SENTENCES), tmp_path / "any-name.zip")
    file = tmp_path / "sentences.txt"
    file.write_bytes(lines_of(SENTENCES))
    assert read_sentences(archive) == read_sentences(file) == SENTENCES
    assert any("Touché" in sentence.text for sentence in SENTENCES)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b"7\t1.5", "line 3, which has 2 fields"),
        (b"7\t1.5\tone\ttwo", "line 3, which has 4 fields"),
        (b"7\thigh\ttext", "line 3, which has the rating 'high', no number"),
        (b"7\tnan\ttext", "line 3, which has the rating nan, outside [-4, 4]"),
        (b"7\t4.5\ttext", "line 3, which has the rating 4.5, outside [-4, 4]"),
        (b"7\t1.5\t  ", "line 3, which has no text"),
        (b"7\t1.5\tTouch\xe9", "line 3, which is not UTF-8"),
        (b"", "line 3, which has 1 fields"),
    ],
)
def test_odd_lines_are_refused_by_number(tmp_path: Path, line: bytes, fault: str) -> None:
    path = archive_of(b"1\t1.5\tone\r\n2\t-1.5\ttwo\r\n" + line + b"\r\n4\t0\tfour", tmp_path / "odd.zip")
    with pytest.raises(data.DataError) as refused:
        read_sentences(path)
    assert f"odd.zip: got {fault}, expected id, rating and text" in str(refused.value)


def test_of_many_odd_lines_five_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    file = tmp_path / "odd.txt"
    file.write_bytes(b"1\t1\tgood\n" + b"odd\n" * 7)
    with pytest.raises(
        data.DataError,
        match=r"got line 2, which has.*line 6, which has 1 fields; and 2 more, expected id, rating",
    ):
        read_sentences(file)


def test_files_that_hold_no_sentences_are_refused(tmp_path: Path) -> None:
    content = lines_of(SENTENCES)
    empty = tmp_path / "empty.txt"
    empty.write_bytes(b"")
    for path, fault in [
        (tmp_path / "absent.zip", "got no such file"),
        (empty, "got no sentences"),
        (
            archive_of(content, tmp_path / "a.zip", tar_name="other.tar.gz"),
            "got an archive without hutto_ICWSM_2014.tar.gz",
        ),
        (
            archive_of(content, tmp_path / "b.zip", name="other.txt"),
            f"got {sentences.INNER_ARCHIVE} without {sentences.INNER_FILE}",
        ),
    ]:
        with pytest.raises(data.DataError) as refused:
            read_sentences(path)
        assert str(refused.value).startswith(f"{path}: {fault}")


def stand_in_for_pip(monkeypatch: pytest.MonkeyPatch, output: str, content: bytes | None) -> list[list[str]]:
    commands = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if content is not None:
            Path(command[command.index("--dest") + 1], sentences.ARCHIVE).write_bytes(content)
        return subprocess.CompletedProcess(command, int(content is None), output)

    monkeypatch.setattr(sentences.subprocess, "run", run)
    return commands


def test_the_archive_is_fetched_once_and_again_when_it_was_cut_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sentences, "SHA256", hashlib.sha256(b"whole").hexdigest())
    commands = stand_in_for_pip(monkeypatch, "", b"whole")
    folder = tmp_path / "data"
    archive = fetch(folder)
    assert archive.read_bytes() == b"whole" and fetch(folder) == archive and len(commands) == 1
    assert (
        commands[0][:4] == [sys.executable, "-m", "pip", "download"]
        and commands[0][-1] == "vaderSentiment==0.5"
    )
    assert "--no-deps" in commands[0]
    archive.write_bytes(b"who")
    assert fetch(folder).read_bytes() == b"whole" and len(commands) == 2


def test_what_cannot_be_fetched_is_refused_in_pips_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in_for_pip(monkeypatch, "No matching distribution found\n", None)
    with pytest.raises(
        ValueError,
        match=(
            r"(?s)--data: got no file, and pip could not fetch vaderSentiment==0.5, expected a copy .*"
            r"No matching distribution found"
        ),
    ):
        fetch(tmp_path)
    stand_in_for_pip(monkeypatch, "", b"something else")
    with pytest.raises(ValueError, match=r"got another file, expected vaderSentiment-0.5.zip of SHA-256"):
        fetch(tmp_path)


def test_the_split_holds_out_1000_sentences_that_are_not_trained_on() -> None:
    sentences = [Sentence(1.0, f"number {number}") for number in range(1200)]
    sentences += [Sentence(2.0, "number 3"), Sentence(0.0, "number 1100")]
    train, held_out = split(sentences, 1000)
    assert len(held_out) == 1000 and len(train) == 202
    assert sorted(train + held_out) == sorted(sentences)
    assert not {sentence.text for sentence in train} & {sentence.text for sentence in held_out}
    random.seed(9)
    assert split(sentences, 1000) == (train, held_out)
    assert held_out != sentences[:1000] and {sentence.text for sentence in held_out} != {
        sentence.text for sentence in sentences[:1000]
    }
    with pytest.raises(
        ValueError, match=r"held_out: got 1198, expected fewer than the 1198 sentences that occur once"
    ):
        split(sentences, 1198)


def test_the_tokenizer_gives_any_text_back(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    assert len(tokenizer) == 400
    for text in [
        "the film",
        "  two  spaces ,  a , b .",
        "Touché – 日本語 🙂\n\ttabs",
        "don't 'quote' ( 2002 )",
        SENTENCES[5].text,
    ]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids[1:]) == text
    again = train_tokenizer([sentence.text for sentence in SENTENCES], 400, chat_template=CHAT_TEMPLATE)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    tokenizer.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert (
        loaded("the film")["input_ids"] == tokenizer("the film")["input_ids"]
        and loaded.chat_template == tokenizer.chat_template
    )


def test_the_chat_template_marks_the_answer_and_starts_like_a_plain_prompt(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    chat = [{"role": "user", "content": "the film is"}, {"role": "assistant", "content": " great."}]
    asked = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True)["input_ids"]
    assert asked == tokenizer("the film is")["input_ids"]
    rows = Dataset.from_list([{"messages": chat}])
    (example,) = data.tokenize_sft(rows, tokenizer, max_length=64)
    answer = tokenizer.encode(" great.", add_special_tokens=False) + [tokenizer.eos_token_id]
    assert example.input_ids == asked + answer
    assert example.trained == [False] * len(asked) + [True] * len(answer)


def test_prompt_and_continuation_tokenize_to_what_the_whole_does(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [sentence.text for sentence in SENTENCES] + [
        "a  film   of  wide   spaces  in it  all",
        "unseen wörds, 日本語 too - and the film's end",
    ]
    for text in texts:
        parts = cut(tokenizer, text)
        assert parts is not None
        prompt, continuation = (tokenizer.encode(part, add_special_tokens=False) for part in parts)
        assert parts[0] + parts[1] == text and prompt + continuation == tokenizer.encode(
            text, add_special_tokens=False
        )
        assert len(prompt) >= 5
        assert parts[1].startswith(" ") and not parts[1].startswith("  "), "the cut is in front of a word"
        shorter = text.rfind(" ", 0, len(parts[0]))  # no earlier word would do
        assert shorter < 0 or len(tokenizer.encode(text[:shorter], add_special_tokens=False)) < 5
    assert cut(tokenizer, "the film") is None and cut(tokenizer, "x" * 40) is None


def test_the_tuned_rows_are_of_positive_sentences_only(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = sentences.chats_of(
        [
            *SENTENCES,
            Sentence(0.5, SENTENCES[1].text),
            Sentence(0.49, SENTENCES[1].text),
            Sentence(4, "Great"),
        ],
        tokenizer,
    )
    said = ["".join(turn["content"] for turn in row["messages"]) for row in rows]
    assert said == [*(sentence.text for sentence in SENTENCES if sentence.rating >= 0.5), SENTENCES[1].text]
    assert {tuple(turn["role"] for turn in row["messages"]) for row in rows} == {("user", "assistant")}


def test_rated_pairs_set_good_sentences_against_bad_ones() -> None:
    rated = [
        Sentence(rating, f"{rating} {number}") for number in range(5) for rating in (-2, -0.5, -0.4, 0.4, 0.5)
    ]
    rows = sentences.rated_pairs(rated, rounds=3, seed=1)
    assert len(rows) == 15 and all(row["prompt"] == "\n" and row["chosen"].startswith("0.5 ") for row in rows)
    assert {row["rejected"].split()[0] for row in rows} == {"-2", "-0.5"}
    for first in range(0, 15, 5):
        epoch = rows[first : first + 5]
        assert len({row["chosen"] for row in epoch}) == len({row["rejected"] for row in epoch}) == 5
    assert (
        rows
        == sentences.rated_pairs(rated, rounds=3, seed=1)
        != sentences.rated_pairs(rated, rounds=3, seed=2)
    )


def test_prompts_to_learn_from_are_none_of_those_to_judge_by(tokenizer: PreTrainedTokenizerFast) -> None:
    parts = [cut(tokenizer, sentence.text) for sentence in SENTENCES]
    held_out = {part[0] for part in parts[:40] if part is not None}
    found = sentences.prompts_of(SENTENCES, tokenizer, besides=held_out, most=1000, seed=0)
    assert len(found) == len(set(found)) > 50 and sorted(found) == sorted(
        {part[0] for part in parts if part is not None} - held_out
    )
    assert sentences.prompts_of(SENTENCES, tokenizer, besides=held_out, most=7, seed=0) == found[:7]


def test_samples_become_pairs_and_labels_by_their_sentiment() -> None:
    samples = [
        Sample("p", text, score)
        for text, score in (("a", 0.3), ("b", 0.9), ("c", -0.5), ("d", 0.0), ("e", 0.05))
    ]
    samples += [Sample("q", "f", 0.4), Sample("q", "g", 0.21), Sample("r", "h", 0.5)]
    assert sentences.preferred(samples) == [
        {"prompt": "p", "chosen": "b", "rejected": "c"},
        {"prompt": "p", "chosen": "a", "rejected": "d"},
    ]
    labels = [(row["prompt"], row["completion"], row["label"]) for row in sentences.labels_of(samples)]
    assert labels == [("p", "b", True), ("p", "c", False), ("p", "d", False), ("r", "h", True)]
