"""Text and conversations as tokens: what is trained, what is cut, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from fastalign.data import DataError, load_rows, tokenize_prompts, tokenize_sft, tokenize_text
from tests.data.chats import CHATML, HEADER, MARKED, PROMPT, build, trained_text
from tests.data.files import write

FORGETFUL = (
    "{% for m in messages %}" + HEADER + "{% if loop.last %}{{ m['content'] }}{% else %}"
    "{{ m['content'].split('</think>')[-1] }}{% endif %}<|im_end|>\n{% endfor %}" + PROMPT
)


TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What did you think of the film?"},
    {"role": "assistant", "content": "It was great.\n"},
    {"role": "user", "content": "And the end?"},
    {"role": "assistant", "content": " Really great, é世."},
]


def chats(*conversations: Any) -> Dataset:
    return Dataset.from_dict({"messages": list(conversations)}, on_mixed_types="use_json")


class TestTokenizeText:
    def test_appends_one_eos_and_keeps_the_tokenizers_bos(self) -> None:
        rows = Dataset.from_dict({"text": ["The film", "The film<|im_end|>"]})
        plain, ended = tokenize_text(rows, build(), max_length=64)
        assert plain == ended
        assert plain.input_ids == [*build()("The film")["input_ids"], 0]
        assert plain.trained == [False] + [True] * (len(plain.input_ids) - 1)
        assert tokenize_text(rows, build(bos=True), max_length=64)[0].input_ids == [2, *plain.input_ids]

    def test_a_bos_in_the_text_that_the_tokenizer_adds_too_is_said(self) -> None:
        """As in texts that a chat template rendered before. TRL's issues 1400 and 1912 met it."""
        tokenizer = build(bos=True)
        begun = tokenizer.bos_token + "The film"
        texts = {"text": ["The film", begun], "prompt": ["The film", begun], "completion": [" was"] * 2}
        rows = Dataset.from_dict(texts)
        for tokenize in (
            lambda: tokenize_text(rows.select_columns("text"), tokenizer, max_length=64),
            lambda: tokenize_sft(rows.remove_columns("text"), tokenizer, max_length=64),
            lambda: tokenize_prompts(rows.select_columns("prompt"), tokenizer, max_length=64),
        ):
            with pytest.warns(UserWarning, match=r"^row 2: begins with .* twice, .* \(1 of 2 rows\)"):
                tokenize()

    @pytest.mark.parametrize("max_length", [2, 3, 7, 16, 17, 18])
    def test_every_token_of_a_long_document_is_a_target_once(self, max_length: int) -> None:
        tokenizer = build()
        text = "The film was great, really great. What did you think?"
        whole = [*tokenizer(text)["input_ids"], 0]
        pieces = tokenize_text(Dataset.from_dict({"text": [text]}), tokenizer, max_length=max_length)
        assert max(len(piece.input_ids) for piece in pieces) <= max_length
        assert [token for piece in pieces for token, train in zip(*piece, strict=True) if train] == whole[1:]
        # Each piece begins with the token before its first target.
        firsts = [piece.input_ids[0] for piece in pieces]
        assert firsts == [whole[i * (max_length - 1)] for i in range(len(pieces))]

    def test_does_not_depend_on_how_rows_are_batched(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = Dataset.from_dict({"text": [f"The film {i} was great" for i in range(23)]})
        together = tokenize_text(rows, build(), max_length=6)
        monkeypatch.setattr("fastalign.data.tokenization.BATCH", 4)
        assert tokenize_text(rows, build(), max_length=6) == together

    def test_names_the_lines_of_the_file(self, tmp_path: Path) -> None:
        rows: list[Any] = [
            {"text": "x"},
            {"text": " \n"},
            {"other": 1},
            {"text": 3},
            {"text": ""},
            {"text": ["x"]},
        ]
        path = tmp_path / "a.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows).replace("\n", "\n\n", 1))
        with pytest.raises(DataError) as caught:
            tokenize_text(load_rows(str(path)), build(), max_length=8)
        assert str(caught.value).splitlines() == [
            f"{path}, rows 3, 6: column 'text': got an empty text, expected one that is not",
            f"{path}, row 4: column 'text': got null or no such column, expected text",
            f"{path}, row 5: column 'text': got int, expected text",
            f"{path}, row 7: column 'text': got list, expected text",
        ]
        # Shuffled or split, a row keeps its number.
        with pytest.raises(
            DataError,
            match=r"a\.jsonl, rows 6, 3: column 'text': got an empty text, expected one that is not$",
        ):
            tokenize_text(load_rows(str(path)).select([4, 0, 1]), build(), max_length=8)

    def test_names_few_rows_and_counts_the_others(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            pq.write_table(pa.table({"text": ["x", "", None, "", ""]}), tmp_path / f"{name}.parquet")
        with pytest.raises(DataError) as caught:
            tokenize_text(load_rows(str(tmp_path / "*.parquet")), build(), max_length=8)
        a, b = (str(tmp_path / f"{name}.parquet") for name in ("a", "b"))
        assert str(caught.value).splitlines() == [
            f"{a}, rows 2, 4, 5; {b}, rows 2, 4 and 1 more: column 'text': "
            "got an empty text, expected one that is not",
            f"{a}, row 3; {b}, row 3: column 'text': got null or no such column, expected text",
        ]

    def test_a_slow_tokenizer_is_refused(self) -> None:
        class Slow(PreTrainedTokenizerFast):
            is_fast = False

        rows = Dataset.from_list([{"prompt": "The", "completion": " film"}])
        slow = Slow(tokenizer_object=build().backend_tokenizer, eos_token="<|im_end|>")
        with pytest.raises(ValueError, match=r"^tokenizer: got Slow \(slow\), expected a fast tokenizer: it"):
            tokenize_sft(rows, slow, max_length=8)

    def test_refuses_what_it_cannot_use(self, tmp_path: Path) -> None:
        rows = load_rows(write(tmp_path / "a.jsonl", [{"body": "x", "n": 1}]))
        with pytest.raises(DataError, match=r"a\.jsonl: columns: got body, n, expected 'text' too$"):
            tokenize_text(rows, build(), max_length=8)
        alpaca = load_rows(write(tmp_path / "b.jsonl", [{"instruction": "x", "input": "", "output": "y"}]))
        with pytest.raises(
            DataError, match="expected 'prompt' and 'completion' too; of Alpaca's columns make"
        ):
            tokenize_sft(alpaca, build(), max_length=8)
        with pytest.raises(ValueError, match="max_length: got .*, expected at least 2"):
            tokenize_text(rows, build(), max_length=1, column="body")
        tokenizer = build()
        tokenizer.eos_token = None
        with pytest.raises(ValueError, match="without an EOS token"):
            tokenize_text(rows, tokenizer, max_length=8, column="body")


class TestTokenizeSft:
    @pytest.mark.parametrize("trim", [False, True])
    @pytest.mark.parametrize("template", [CHATML, MARKED])
    def test_trains_assistant_turns_with_their_end(self, template: str, trim: bool) -> None:
        tokenizer = build(template, trim=trim)
        (sequence,) = tokenize_sft(chats(TALK), tokenizer, max_length=512)
        assert sequence.input_ids == tokenizer.apply_chat_template(TALK, return_dict=False)
        assert trained_text(tokenizer, sequence) == "It was great.\n<|im_end|> Really great, é世.<|im_end|>"

    def test_both_routes_give_the_same_mask_and_transformers_own(self) -> None:
        talks = [TALK, TALK[:3], TALK[1:4], [*TALK, {"role": "user", "content": "Thanks."}], TALK[2:]]
        marked = build(MARKED)
        by_marks = tokenize_sft(chats(*talks), marked, max_length=512)
        assert tokenize_sft(chats(*talks), build(CHATML), max_length=512) == by_marks
        for talk, sequence in zip(talks, by_marks, strict=True):
            expected: Any = marked.apply_chat_template(
                talk, return_dict=True, return_assistant_tokens_mask=True
            )
            assert sequence == (expected["input_ids"], [mask == 1 for mask in expected["assistant_masks"]])

    def test_a_turn_without_end_token_is_trained_whole_and_said(self) -> None:
        tokenizer = build(
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}"
        )
        with pytest.warns(UserWarning, match="no special token is trained"):
            (sequence,) = tokenize_sft(chats(TALK[1:3]), tokenizer, max_length=512)
        assert trained_text(tokenizer, sequence) == "It was great.\n\n"

    def test_text_trains_the_completion_and_one_eos(self) -> None:
        rows = Dataset.from_dict(
            {"prompt": ["The film", "The film"], "completion": [" was great.", " was<|im_end|>"]}
        )
        first, second = tokenize_sft(rows, build(bos=True), max_length=64)
        tokenizer = build()
        prompt = tokenizer("The film")["input_ids"]
        for sequence, completion in ((first, " was great."), (second, " was")):
            continuation = [*tokenizer(completion)["input_ids"], 0]
            assert sequence.input_ids == [2, *prompt, *continuation]
            assert sequence.trained == [False] * (1 + len(prompt)) + [True] * len(continuation)

    def test_says_when_a_token_joins_prompt_and_completion(self) -> None:
        rows = Dataset.from_dict({"prompt": ["The fi", "The"], "completion": ["lm was great.", " film"]})
        with pytest.warns(UserWarning, match=r"^row 1: a token joins .* \(1 of 2 rows\)"):
            joined, _ = tokenize_sft(rows, build(), max_length=64)
        assert trained_text(build(), joined) == " film was great.<|im_end|>"

    @pytest.mark.parametrize("template", [CHATML, MARKED])
    def test_messages_of_a_completion_are_trained_and_those_of_a_prompt_not(self, template: str) -> None:
        rows = Dataset.from_dict({"prompt": [TALK[:4]], "completion": [TALK[4:]]})
        tokenizer = build(template)
        (sequence,) = tokenize_sft(rows, tokenizer, max_length=512)
        assert sequence.input_ids == tokenizer.apply_chat_template(TALK, return_dict=False)
        assert trained_text(tokenizer, sequence) == " Really great, é世.<|im_end|>"

    def test_a_template_without_prefixes_is_refused_by_row(self) -> None:
        thoughtful = [*TALK[:2], {"role": "assistant", "content": "<think>Hm.</think>Good."}, *TALK[3:]]
        rows = chats(TALK, thoughtful, thoughtful[:3])
        with pytest.raises(
            DataError, match=r"^row 2: chat template of .*: got earlier turns rendered differently"
        ):
            tokenize_sft(rows, build(FORGETFUL), max_length=512)
        tokenizer = build(FORGETFUL)
        single, last = tokenize_sft(rows.select([0, 2]), tokenizer, max_length=512)
        assert trained_text(tokenizer, last) == "<think>Hm.</think>Good.<|im_end|>"
        assert single == tokenize_sft(chats(TALK), build(MARKED), max_length=512)[0]

    def test_a_generation_prompt_that_no_turn_begins_with_is_refused_by_row(self) -> None:
        template = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
        thoughtful = [TALK[1], {"role": "assistant", "content": "<think>Hm.</think>Good."}]
        message = (
            (
                r"^row 2: chat template of .*: got an answer that begins with "
                r"'<|im_start|>assistant\nIt was great..*', expected its generation prompt "
                r"'<|im_start|>assistant\n<think>'"
            )
            .replace("|", "\\|")
            .replace("\\n", "\\\\n")
        )
        with pytest.raises(DataError, match=message):
            tokenize_sft(chats(thoughtful, TALK[1:3]), build(template), max_length=512)

    def test_nothing_is_added_to_what_the_template_writes_and_its_first_token_is_no_target(self) -> None:
        template = "{% generation %}{{ messages[0]['content'] }}<|im_end|>{% endgeneration %}"
        (sequence,) = tokenize_sft(chats(TALK[2:3]), build(template, bos=True), max_length=512)
        assert sequence.input_ids == [*build()("It was great.\n")["input_ids"], 0]
        assert sequence.trained == [False] + [True] * (len(sequence.input_ids) - 1)

    def test_a_marked_template_that_rewrites_the_prompt_is_refused_by_row(self) -> None:
        template = "{{ messages | length }}" + MARKED
        rows = Dataset.from_dict({"prompt": [TALK[:2], TALK[:4]], "completion": [TALK[2:], TALK[4:]]})
        with pytest.raises(
            DataError, match=r"^row 2: chat template of .*: got earlier turns rendered differently"
        ):
            tokenize_sft(rows, build(template), max_length=512)

    def test_tools_and_missing_keys_reach_the_template(self, tmp_path: Path) -> None:
        template = "{% for t in tools %}{{ t['name'] }} {% endfor %}" + CHATML.replace(
            "{{ m['content'] }}", "{{ m['content'] if 'content' in m else m['tool_calls'][0]['name'] }}"
        )
        talk = [TALK[1], {"role": "assistant", "tool_calls": [{"name": "great"}]}]
        pq.write_table(
            pa.Table.from_pylist([{"messages": talk, "tools": [{"name": "film"}]}]), tmp_path / "a.parquet"
        )
        tokenizer = build(template)
        (sequence,) = tokenize_sft(load_rows(str(tmp_path / "a.parquet")), tokenizer, max_length=512)
        assert str(tokenizer.decode(sequence.input_ids)).startswith("film <|im_start|>user\n")
        assert trained_text(tokenizer, sequence) == "great<|im_end|>"

    def test_cuts_at_the_right_and_says_so(self) -> None:
        rows = chats(TALK[1:3], TALK)
        short, long = tokenize_sft(rows, build(CHATML), max_length=512)
        length = len(long.input_ids) - 3
        with pytest.warns(UserWarning, match=rf"^row 2: longer than max_length={length}, .* \(1 of 2 rows\)"):
            kept, cut = tokenize_sft(rows, build(MARKED), max_length=length, too_long="truncate")
        assert kept == short
        assert cut == (long.input_ids[:length], long.trained[:length])

    @pytest.mark.parametrize("template", [CHATML, MARKED])
    def test_a_prompt_that_fills_max_length_is_refused(self, template: str) -> None:
        tokenizer = build(template)
        prompt = tokenizer.apply_chat_template(TALK[1:2], add_generation_prompt=True, return_dict=False)
        rows = chats(TALK[1:3], TALK[1:3])
        with pytest.warns(UserWarning, match="rows 1, 2: longer"):
            assert len(tokenize_sft(rows, tokenizer, max_length=len(prompt) + 1, too_long="truncate")) == 2
        with pytest.raises(
            DataError, match=rf"^rows 1, 2: no token to train on within max_length={len(prompt)}"
        ):
            tokenize_sft(rows, tokenizer, max_length=len(prompt), too_long="truncate")

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            (None, "column 'messages': got NoneType, expected a list of messages"),
            ("text", "column 'messages': got str, expected a list of messages"),
            ([], "column 'messages': got no assistant turn"),
            (TALK[:2], "column 'messages': got no assistant turn"),
            (
                [{"from": "human", "value": "x"}],
                "got the keys from, value, expected messages with a 'role' and a 'content'",
            ),
            ([TALK[1], "text"], "got str, expected messages with a 'role' and a 'content'"),
            ([TALK[1], {"role": "assistant", "content": 3}], "got a 'content' of type int, expected text"),
            ([TALK[1], {"role": "assistant", "content": " "}], "got only assistant turns without content"),
            (
                [TALK[1], {"role": "assistant", "content": ["x"]}],
                "got a part 'x' of a content, expected parts",
            ),
            ([{"role": "user"}, TALK[2]], "got a message of role 'user' without a 'content'"),
            ([{"role": "user", "content": None}, TALK[2]], "role 'user' without a 'content'"),
            ([{"role": "other", "content": "x"}, TALK[2]], "chat template of .*: got the error unknown role"),
        ],
    )
    def test_refuses_messages_by_row(self, tmp_path: Path, bad: Any, message: str) -> None:
        template = CHATML.replace("{{ m['content'] }}", "{{ '' + m['content'] }}").replace(
            "<|im_start|>{{",
            "{% if m['role'] == 'other' %}{{ raise_exception('unknown role') }}{% endif %}<|im_start|>{{",
        )
        rows = load_rows(write(tmp_path / "a.jsonl", [{"messages": TALK}, {"messages": bad}]))
        with pytest.raises(DataError, match=r"a\.jsonl, row 2: .*" + message):
            tokenize_sft(rows, build(template), max_length=512)

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            ({"prompt": "x"}, "column 'completion': got null or no such column"),
            ({"prompt": "x", "completion": "\n"}, "column 'completion': got an empty text"),
            ({"prompt": "x", "completion": 3}, "column 'completion': got int, expected text"),
            ({"prompt": "", "completion": "x"}, "column 'prompt': got an empty text"),
            ({"prompt": TALK[:2], "completion": "x"}, "column 'prompt': got list, expected text"),
        ],
    )
    def test_refuses_texts_by_row(self, tmp_path: Path, bad: Any, message: str) -> None:
        rows = load_rows(write(tmp_path / "a.jsonl", [{"prompt": "The", "completion": " film"}, bad]))
        with pytest.raises(DataError, match=rf"a\.jsonl, row 2: {message}"):
            tokenize_sft(rows, build(), max_length=64)

    def test_refuses_what_it_cannot_use(self, tmp_path: Path) -> None:
        rows = load_rows(write(tmp_path / "a.jsonl", [{"prompt": "x"}]))
        with pytest.raises(DataError, match=r"a\.jsonl: columns: got prompt, expected 'completion' too$"):
            tokenize_sft(rows, build(), max_length=8)
        both = load_rows(write(tmp_path / "b.jsonl", [{"messages": TALK, "completion": "x"}]))
        with pytest.raises(
            DataError, match="columns: got both 'messages' and 'completion', expected one of them"
        ):
            tokenize_sft(both, build(CHATML), max_length=8)
        beside = load_rows(write(tmp_path / "c.jsonl", [{"messages": TALK, "prompt": "x"}]))
        with pytest.warns(UserWarning, match=r"c\.jsonl: column 'prompt' is not used beside 'messages'"):
            assert tokenize_sft(beside, build(MARKED), max_length=512) == tokenize_sft(
                chats(TALK), build(MARKED), max_length=512
            )
        with pytest.raises(ValueError, match="without a chat template"):
            tokenize_sft(chats(TALK), build(), max_length=8)
        unmarked = MARKED.replace("m['role'] == 'assistant'", "false")
        with pytest.raises(DataError, match="row 1: no token to train on$"):
            tokenize_sft(chats(TALK), build(unmarked), max_length=512)
