import json
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers.modeling_flash_attention_utils as flash
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from fastalign.data import (
    DataError,
    Tokenized,
    beyond_rounding,
    check_packing,
    collate,
    load_rows,
    pack,
    tokenize_sft,
    tokenize_text,
)

CORPUS = ["The film was great, really great.", "What did you think of the film?", "user assistant system\n\n"]
HEADER = "<|im_start|>{{ m['role'] }}\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = "{% for m in messages %}" + HEADER + "{{ m['content'] }}<|im_end|>\n{% endfor %}" + PROMPT
MARKED = (
    "{% for m in messages %}"
    + HEADER
    + "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}" + PROMPT
)
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


def build(template: str | None = None, *, bos: bool = False, trim: bool = False) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|im_end|>", "<|im_start|>", "<|bos|>"]
    core.train_from_iterator(
        CORPUS * 10,
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    core.post_processor = processors.ByteLevel(trim_offsets=trim)
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        bos_token="<|bos|>" if bos else None,
        chat_template=template,
    )


def write(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def trained_text(tokenizer: PreTrainedTokenizerFast, sequence: Tokenized) -> str:
    return str(tokenizer.decode([id for id, train in zip(*sequence, strict=True) if train]))


def chats(*conversations: Any) -> Dataset:
    return Dataset.from_dict({"messages": list(conversations)}, on_mixed_types="use_json")


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class TestTokenizeText:
    def test_appends_one_eos_and_keeps_the_tokenizers_bos(self) -> None:
        rows = Dataset.from_dict({"text": ["The film", "The film<|im_end|>"]})
        plain, ended = tokenize_text(rows, build(), max_length=64)
        assert plain == ended
        assert plain.input_ids == [*build()("The film")["input_ids"], 0]
        assert plain.trained == [False] + [True] * (len(plain.input_ids) - 1)
        assert tokenize_text(rows, build(bos=True), max_length=64)[0].input_ids == [2, *plain.input_ids]

    @pytest.mark.parametrize("max_length", [2, 3, 7, 16, 17, 18])
    def test_every_token_of_a_long_document_is_a_target_once(self, max_length: int) -> None:
        tokenizer = build()
        text = "The film was great, really great. What did you think?"
        whole = [*tokenizer(text)["input_ids"], 0]
        pieces = tokenize_text(Dataset.from_dict({"text": [text]}), tokenizer, max_length=max_length)
        assert max(len(piece.input_ids) for piece in pieces) <= max_length
        assert [id for piece in pieces for id, train in zip(*piece, strict=True) if train] == whole[1:]
        # Each piece begins with the token before its first target.
        firsts = [piece.input_ids[0] for piece in pieces]
        assert firsts == [whole[i * (max_length - 1)] for i in range(len(pieces))]

    def test_does_not_depend_on_how_rows_are_batched(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = Dataset.from_dict({"text": [f"The film {i} was great" for i in range(23)]})
        together = tokenize_text(rows, build(), max_length=6)
        monkeypatch.setattr("fastalign.data.BATCH", 4)
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
            f"{path}, rows 3, 6: column 'text' is empty",
            f"{path}, row 4: column 'text' is missing or null",
            f"{path}, row 5: column 'text' must be text, got int",
            f"{path}, row 7: column 'text' must be text, got list",
        ]
        # Shuffled or split, a row keeps its number.
        with pytest.raises(DataError, match=r"a\.jsonl, rows 6, 3: column 'text' is empty$"):
            tokenize_text(load_rows(str(path)).select([4, 0, 1]), build(), max_length=8)

    def test_names_few_rows_and_counts_the_others(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            pq.write_table(pa.table({"text": ["x", "", None, "", ""]}), tmp_path / f"{name}.parquet")
        with pytest.raises(DataError) as caught:
            tokenize_text(load_rows(str(tmp_path / "*.parquet")), build(), max_length=8)
        a, b = (str(tmp_path / f"{name}.parquet") for name in ("a", "b"))
        assert str(caught.value).splitlines() == [
            f"{a}, rows 2, 4, 5; {b}, rows 2, 4 and 1 more: column 'text' is empty",
            f"{a}, row 3; {b}, row 3: column 'text' is missing or null",
        ]

    def test_refuses_what_it_cannot_use(self, tmp_path: Path) -> None:
        rows = load_rows(write(tmp_path / "a.jsonl", [{"body": "x", "n": 1}]))
        with pytest.raises(DataError, match=r"a\.jsonl: no column 'text'; there are: body, n$"):
            tokenize_text(rows, build(), max_length=8)
        with pytest.raises(ValueError, match="max_length must be at least 2"):
            tokenize_text(rows, build(), max_length=1, column="body")
        tokenizer = build()
        tokenizer.eos_token = None
        with pytest.raises(ValueError, match="must have an EOS token"):
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
            own: Any = marked.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
            assert sequence == (own["input_ids"], [mask == 1 for mask in own["assistant_masks"]])

    def test_a_turn_without_end_token_is_trained_whole_and_said(self) -> None:
        tokenizer = build("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
                          "{% if add_generation_prompt %}assistant: {% endif %}")  # fmt: skip
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
            DataError, match=r"^row 2: the chat template of .* renders earlier turns differently"
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
                r"^row 2: the answer does not begin with the generation prompt of the chat template of .*: it begins with "
                r"'<|im_start|>assistant\nIt was great..*', and a model is asked with '<|im_start|>assistant\n<think>'"
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
            DataError, match=r"^row 2: the chat template of .* renders earlier turns differently"
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
            (None, "column 'messages' must be a list of messages, got NoneType"),
            ("text", "column 'messages' must be a list of messages, got str"),
            ([], "column 'messages' has no assistant turn"),
            (TALK[:2], "column 'messages' has no assistant turn"),
            (
                [{"from": "human", "value": "x"}],
                "messages with a 'role' and a 'content', got the keys from, value",
            ),
            ([TALK[1], "text"], "messages with a 'role' and a 'content', got str"),
            ([TALK[1], {"role": "assistant", "content": 3}], "messages whose 'content' is text, got int"),
            ([TALK[1], {"role": "assistant", "content": " "}], "has assistant turns without content only"),
            (
                [TALK[1], {"role": "assistant", "content": ["x"]}],
                "must hold contents whose parts are .*, got 'x'",
            ),
            ([{"role": "other"}, TALK[2]], "the chat template of .* refuses it: unknown role"),
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
            ({"prompt": "x"}, "column 'completion' is missing or null"),
            ({"prompt": "x", "completion": "\n"}, "column 'completion' is empty"),
            ({"prompt": "x", "completion": 3}, "column 'completion' must be text, got int"),
            ({"prompt": "", "completion": "x"}, "column 'prompt' is empty"),
            ({"prompt": TALK[:2], "completion": "x"}, "column 'prompt' must be text, got list"),
        ],
    )
    def test_refuses_texts_by_row(self, tmp_path: Path, bad: Any, message: str) -> None:
        rows = load_rows(write(tmp_path / "a.jsonl", [{"prompt": "The", "completion": " film"}, bad]))
        with pytest.raises(DataError, match=rf"a\.jsonl, row 2: {message}$"):
            tokenize_sft(rows, build(), max_length=64)

    def test_refuses_what_it_cannot_use(self, tmp_path: Path) -> None:
        rows = load_rows(write(tmp_path / "a.jsonl", [{"prompt": "x"}]))
        with pytest.raises(DataError, match=r"a\.jsonl: no column 'completion'; there are: prompt$"):
            tokenize_sft(rows, build(), max_length=8)
        both = load_rows(write(tmp_path / "b.jsonl", [{"messages": TALK, "completion": "x"}]))
        with pytest.raises(DataError, match="'messages' and 'completion' exclude each other"):
            tokenize_sft(both, build(CHATML), max_length=8)
        beside = load_rows(write(tmp_path / "c.jsonl", [{"messages": TALK, "prompt": "x"}]))
        with pytest.warns(UserWarning, match=r"c\.jsonl: column 'prompt' is not used beside 'messages'"):
            assert tokenize_sft(beside, build(MARKED), max_length=512) == tokenize_sft(
                chats(TALK), build(MARKED), max_length=512
            )
        with pytest.raises(ValueError, match="must have a chat template"):
            tokenize_sft(chats(TALK), build(), max_length=8)
        unmarked = MARKED.replace("m['role'] == 'assistant'", "false")
        with pytest.raises(DataError, match="row 1: no token to train on$"):
            tokenize_sft(chats(TALK), build(unmarked), max_length=512)


class TestPack:
    @pytest.mark.parametrize("capacity", [1, 7, 64, 1000])
    def test_each_index_once_within_capacity_and_near_the_least(self, capacity: int) -> None:
        generator = random.Random(capacity)
        lengths = [generator.randint(1, capacity) for _ in range(500)]
        bins = pack(lengths, capacity)
        assert sorted(index for bin in bins for index in bin) == list(range(500))
        assert all(sum(lengths[index] for index in bin) <= capacity for bin in bins)
        assert len(bins) <= 11 / 9 * -(-sum(lengths) // capacity) + 1  # the sum's bound is below the optimum
        assert pack(lengths, capacity) == bins

    def test_takes_the_tightest_bin(self) -> None:
        # First-fit would put 2 with 7 and leave 3 a bin of its own.
        assert pack([7, 8, 2, 3], 10) == [[1, 2], [0, 3]]
        assert pack([5, 5, 5, 5], 10) == [[0, 1], [2, 3]]
        assert pack([], 10) == []

    @pytest.mark.parametrize(
        ("lengths", "named"), [([3, 11], r"lengths\[1\] is 11"), ([0], r"lengths\[0\] is 0")]
    )
    def test_refuses_what_does_not_fit(self, lengths: list[int], named: str) -> None:
        with pytest.raises(ValueError, match=rf"\[1, capacity=10\]; {named}"):
            pack(lengths, 10)


def sequence(*ids: int, trained: Sequence[bool] | None = None) -> Tokenized:
    return Tokenized(list(ids), [False] + [True] * (len(ids) - 1) if trained is None else list(trained))


class TestCollate:
    def test_positions_restart_and_first_tokens_are_no_targets(self) -> None:
        rows = [[sequence(5, 6, 7, trained=[True, False, True]), sequence(8, 9)], [sequence(3, 4)]]
        batch = collate(rows, pad_id=1, length=6)
        assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 1], [3, 4, 1, 1, 1, 1]]
        assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 0, 0]]
        assert batch["labels"].tolist() == [[-100, -100, 7, -100, 9, -100], [-100, 4, -100, -100, -100, -100]]
        assert list(batch) == ["input_ids", "position_ids", "labels"]

    def test_rows_of_one_sequence_need_no_mask(self) -> None:
        batch = collate([[sequence(5, 6, 7)], [sequence(8, 9)]], pad_id=1)
        assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 1]]
        assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 1, 2]]
        assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]

    @pytest.mark.parametrize("length", [None, 6])
    def test_flash_attention_gets_one_row_and_its_lengths(self, length: int | None) -> None:
        rows = [[sequence(5, 6, 7), sequence(8, 9)], [sequence(3, 4)]]
        batch = collate(rows, pad_id=1, attention="flash_attention_2", length=length)
        padding = [] if length is None else [1] * 5
        assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 3, 4, *padding]]
        assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9, -100, 4] + [-100] * len(padding)]
        assert (
            batch["cu_seq_lens_q"].tolist()
            == batch["cu_seq_lens_k"].tolist()
            == [0, 3, 5, 7] + [12] * bool(padding)
        )
        assert batch["cu_seq_lens_q"].dtype == torch.int32
        assert batch["max_length_q"] == batch["max_length_k"] == (5 if padding else 3)

    def test_refuses_bad_arguments(self) -> None:
        with pytest.raises(ValueError, match="attention must be one of sdpa, eager.*; got 'paged'"):
            collate([[sequence(1, 2)]], pad_id=0, attention="paged")
        with pytest.raises(ValueError, match=r"length \(2\) must hold every row"):
            collate([[sequence(1, 2)], [sequence(1), sequence(2, 3)]], pad_id=0, length=2)
        bad: list[list[list[Tokenized]]] = [[], [[]], [[sequence(1, 2)], []]]
        for examples in bad:
            with pytest.raises(ValueError, match="rows of at least one token"):
                collate(examples, pad_id=0)


LAYERS: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
SLIDING = LAYERS | {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4}
V = 61


def make(name: str, attention: str) -> PreTrainedModel:
    # GPT-2's table of positions is shorter than packed rows; sliding windows are shorter than sequences.
    model: Any
    if name == "llama":
        model = LlamaForCausalLM(LlamaConfig(vocab_size=V, **LAYERS))
    elif name == "gpt2":
        small: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=V, bos_token_id=0, eos_token_id=0, **small))
    elif name == "mistral":
        model = MistralForCausalLM(MistralConfig(vocab_size=V, **SLIDING))
    else:
        model = Gemma2ForCausalLM(Gemma2Config(vocab_size=V, **SLIDING))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(
            0.0, 0.3, generator=generator
        )  # far from uniform, so that contamination is large
    model.config._attn_implementation = attention
    model.to(torch.float64).eval()
    assert isinstance(model, PreTrainedModel)
    return model


def logps(model: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    arguments = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        logits: torch.Tensor = model(**arguments, use_cache=False).logits
    targets = batch["labels"][:, 1:]
    picked = logits[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return picked[targets != -100]


ROWS = [[9, 5, 1, 3], [7, 12]]  # lengths; one sequence of a single token, which has no target


def random_rows() -> list[list[Tokenized]]:
    generator = random.Random(1)
    return [[sequence(*(generator.randrange(V) for _ in range(length))) for length in row] for row in ROWS]


@pytest.fixture
def fp64_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    # Eager attention asks for an fp32 softmax, which alone would hide errors below 1e-7.
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda input, dim, dtype=None: softmax(input, dim))


def varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    softmax_scale: float,
    dropout_p: float = 0.0,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    # flash_attn_varlen_func's contract in plain PyTorch, [total, heads, head_dim].
    assert causal and dropout_p == 0.0 and isinstance(max_seqlen_q, int) and max_seqlen_q == max_seqlen_k
    assert torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.diff().max() == max_seqlen_q
    assert cu_seqlens_q[-1] == len(q)
    out = []
    for start, end in pairwise(cu_seqlens_q.tolist()):
        queries, keys, values = (x[start:end].transpose(0, 1) for x in (q, k, v))
        groups = len(queries) // len(keys)
        scores = queries @ keys.repeat_interleave(groups, 0).mT * softmax_scale
        age = torch.arange(end - start)[:, None] - torch.arange(end - start)
        visible = (age >= 0) & ((age <= window_size[0]) | (window_size[0] < 0))
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        out.append((weights @ values.repeat_interleave(groups, 0)).transpose(0, 1))
    return torch.cat(out)


@pytest.fixture
def flash_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers' own flash-attention path, with plain PyTorch in place of the CUDA kernel.
    functions = (None, varlen, None, None, None)
    process = flash._lazy_define_process_function(varlen)
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *_: (functions, (process, None)))


def check_packed_equals_alone(name: str, attention: str, length: int | None) -> None:
    rows = random_rows()
    model = make(name, "sdpa" if attention.startswith("flash") and name != "gemma2" else attention)
    alone = [logps(model, collate([[one]], pad_id=0)) for row in rows for one in row]
    # Padded, not packed: rows of different lengths.
    padded = logps(model, collate([[one] for row in rows for one in row], pad_id=0))
    torch.testing.assert_close(padded, torch.cat(alone), rtol=0, atol=1e-10)
    model = make(name, attention)
    for used in (rows[:1], rows):
        packed = logps(model, collate(used, pad_id=0, length=length, attention=attention))
        expected = torch.cat(alone[: sum(map(len, used))])
        torch.testing.assert_close(packed, expected, rtol=0, atol=1e-10)
    if attention in ("sdpa", "eager"):  # the test sees contamination
        batch = collate(rows, pad_id=0)
        batch["position_ids"] = batch["position_ids"].clamp(max=0) + torch.arange(19).clamp(max=15)
        assert (logps(model, batch) - torch.cat(alone)).abs().max() > 1e-2


@pytest.mark.usefixtures("fp64_softmax")
@pytest.mark.parametrize("length", [None, 24])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma2"])
def test_packed_equals_alone_eager(name: str, length: int | None) -> None:
    check_packed_equals_alone(name, "eager", length)


@pytest.mark.parametrize("length", [None, 24])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_packed_equals_alone_sdpa(name: str, length: int | None) -> None:
    check_packed_equals_alone(name, "sdpa", length)


@pytest.mark.usefixtures("flash_kernel")
@pytest.mark.parametrize("length", [None, 24])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_packed_equals_alone_flash(name: str, length: int | None) -> None:
    check_packed_equals_alone(name, "flash_attention_2", length)


class TestCheckPacking:
    @pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
    def test_accepts_models_that_keep_sequences_apart(self, name: str) -> None:
        model: Any = make(name, "sdpa")
        model.to(torch.float32).train()
        model.base_model.eval()
        modes = [module.training for module in model.modules()]
        check_packing(model)
        assert model.training and [module.training for module in model.modules()] == modes

    def test_allows_for_the_rounding_of_autocast(self) -> None:
        """The backbone's residual stream is fp32, and what is added to it bf16."""
        outputs = torch.tensor([1.0, 0.5])
        assert (
            beyond_rounding(outputs + 1e-2, outputs) == "0.01 off those of the same alone (0.00035 allowed)"
        )
        with torch.autocast("cpu", torch.bfloat16):
            assert beyond_rounding(outputs + 1e-2, outputs) is None
            assert (
                beyond_rounding(outputs + 0.1, outputs) == "0.1 off those of the same alone (0.088 allowed)"
            )

    @pytest.mark.usefixtures("flash_kernel")
    def test_accepts_flash_attention(self) -> None:
        check_packing(make("llama", "flash_attention_2"), attention="flash_attention_2")

    @pytest.mark.parametrize(
        "build_model",
        [
            lambda: MambaForCausalLM(
                MambaConfig(vocab_size=V, hidden_size=16, num_hidden_layers=2, state_size=4)
            ),
            lambda: BloomForCausalLM(BloomConfig(vocab_size=V, hidden_size=16, n_layer=2, n_head=2)),
        ],
        ids=["mamba carries its state on", "bloom counts positions itself"],
    )
    def test_refuses_models_that_do_not(self, build_model: Callable[[], PreTrainedModel]) -> None:
        model = build_model()
        with pytest.raises(
            ValueError, match=rf"{type(model).__name__} with sdpa attention cannot be trained on packed"
        ):
            check_packing(model)
