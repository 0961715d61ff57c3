"""Packing: bins, collated rows, and packed rows that give what each sequence gives alone."""

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash
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
)

from fastalign.data import Tokenized, check_packing, collate, pack
from fastalign.data.packing import beyond_rounding
from tests.data.chats import sequence


class TestPack:
    @pytest.mark.parametrize("capacity", [1, 7, 64, 1000])
    def test_each_index_once_within_capacity_and_near_the_least(self, capacity: int) -> None:
        generator = random.Random(capacity)
        lengths = [generator.randint(1, capacity) for _ in range(500)]
        bins = pack(lengths, capacity)
        assert sorted(index for row in bins for index in row) == list(range(500))
        assert all(sum(lengths[index] for index in row) <= capacity for row in bins)
        assert len(bins) <= 11 / 9 * -(-sum(lengths) // capacity) + 1  # the sum's bound is below the optimum
        assert pack(lengths, capacity) == bins

    def test_takes_the_tightest_bin(self) -> None:
        # First-fit would put 2 with 7 and leave 3 a bin of its own.
        assert pack([7, 8, 2, 3], 10) == [[1, 2], [0, 3]]
        assert pack([5, 5, 5, 5], 10) == [[0, 1], [2, 3]]
        assert pack([], 10) == []

    @pytest.mark.parametrize(
        ("lengths", "named"), [([3, 11], r"lengths: got 11 at index 1"), ([0], r"lengths: got 0 at index 0")]
    )
    def test_refuses_what_does_not_fit(self, lengths: list[int], named: str) -> None:
        with pytest.raises(ValueError, match=rf"{named}, expected 1 to capacity=10"):
            pack(lengths, 10)


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
        with pytest.raises(ValueError, match="attention: got 'paged', expected one of sdpa, eager"):
            collate([[sequence(1, 2)]], pad_id=0, attention="paged")
        with pytest.raises(ValueError, match=r"length: got 2, expected at least"):
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
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim))


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
            ValueError, match=rf"{type(model).__name__} with sdpa attention, whose logits of a packed"
        ):
            check_packing(model)
