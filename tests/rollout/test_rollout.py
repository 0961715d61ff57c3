"""Rollouts of tiny random transformers models against transformers' own generate, a rescoring pass, and
themselves in other batches."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

from fastalign import rollout as module
from fastalign import sample, token_stats
from fastalign.causal_lm import fuse_head
from fastalign.hosts import CACHE
from fastalign.probe import UnsupportedModelError
from fastalign.rollout import POLL, WARM_UP, Rollout, RolloutOutput, custom_generate, generate

pytestmark = pytest.mark.hosts

# Whether transformers' generate lets a penalty count padding. It hands over a tensor of lengths to ignore
# where the processor takes one.
PADDING_COUNTS = "Tensor" not in str(
    inspect.signature(tf.RepetitionPenaltyLogitsProcessor).parameters["prompt_ignore_length"]
)
VOCAB = 97
PAD, NEW = 0, 13  # more than POLL steps, and no multiple of it
GQA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GPT = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
}
CONFIGS: dict[str, Callable[[], tf.PreTrainedConfig]] = {
    "llama": partial(tf.LlamaConfig, **GQA),
    "qwen2": partial(tf.Qwen2Config, **GQA),
    "qwen3-tied": partial(tf.Qwen3Config, **GQA, head_dim=8, tie_word_embeddings=True),
    "mistral-window": partial(tf.MistralConfig, **GQA, sliding_window=4),
    "gemma2-alternating-window": partial(
        tf.Gemma2Config, **GQA, head_dim=8, sliding_window=4, final_logit_softcapping=4.0
    ),
    "llama4-chunks": partial(
        tf.Llama4TextConfig,
        **GQA,
        head_dim=8,
        intermediate_size_mlp=48,
        num_local_experts=2,
        no_rope_layers=[1, 0],
        attention_chunk_size=4,
    ),
    "gpt2": partial(tf.GPT2Config, **GPT),
    "bloom-alibi": partial(
        tf.BloomConfig, vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, eos_token_id=None
    ),
}


def build(config: tf.PreTrainedConfig, **kind: Any) -> Any:
    """A random fp32 model in eval mode whose distributions are neither flat nor the same for every input."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config, **kind).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 or name.endswith("bias"):
                parameter.normal_(std=0.12)
    return model


def llama(**changes: Any) -> Any:
    return build(tf.LlamaConfig(**{**GQA, **changes}))


def prompts(lengths: tuple[int, ...] = (9, 3, 6, 1), width: int = 9) -> tuple[Tensor, Tensor]:
    """Prompts of these lengths, left-padded; 31 and 95 sit in the sign bit of an int32 word, and come
    twice."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (len(lengths), max(lengths)), generator=generator)
    ids[0, :4] = torch.tensor([31, 95, 31, 95])
    ids = torch.nn.functional.pad(ids, (width - ids.shape[1], 0), value=PAD)
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return ids.masked_fill(mask == 0, PAD), mask


def draw(model: Any, batch: tuple[Tensor, Tensor] | None = None, **options: Any) -> Rollout:
    ids, mask = batch or prompts()
    return generate(
        model, ids, mask, **{"max_new_tokens": NEW, "seed": 7, "eos_id": None, "pad_id": PAD, **options}
    )


def own_greedy(model: Any, eos_id: Any = None, **options: Any) -> Tensor:
    """What transformers' generate draws for each prompt alone: some of its versions let a penalty count the
    padding of a batch."""
    own = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": eos_id, "pad_token_id": PAD, **options}
    rows = [row[on.bool()][None] for row, on in zip(*prompts(), strict=True)]
    drawn = [
        model.generate(input_ids=row, attention_mask=torch.ones_like(row), **own)[0, row.shape[1] :]
        for row in rows
    ]
    return torch.nn.utils.rnn.pad_sequence(drawn, batch_first=True, padding_value=PAD)


@contextmanager
def calls_of(model: Any, change: Callable[[Tensor, int], None] = lambda logits, call: None):
    """The number of tokens of each forward; `change` may write into its logits."""
    calls: list[int] = []

    def record(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        change(output.logits, len(calls))
        calls.append(kwargs["input_ids"].shape[1])

    handle = model.register_forward_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@pytest.mark.parametrize("penalty", [1.0, 1.4])
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_equal_transformers_generate(name: str, penalty: float) -> None:
    model = build(CONFIGS[name]())
    expected = own_greedy(model, repetition_penalty=penalty)
    assert len(expected.unique()) > 3
    assert torch.equal(draw(model, temperature=0.0, repetition_penalty=penalty).tokens, expected)
    eos = [int(expected[0, 4]), int(expected[2, 9])]
    ended = draw(model, temperature=0.0, repetition_penalty=penalty, eos_id=eos)
    assert (
        torch.equal(ended.tokens, own_greedy(model, eos, repetition_penalty=penalty)) and not ended.mask.all()
    )


def test_the_penalty_of_each_row_is_its_own() -> None:
    model = llama()
    penalties = torch.tensor([1.0, 1.4, 1.0, 2.0])
    expected = torch.stack(
        [own_greedy(model, repetition_penalty=float(p))[row] for row, p in enumerate(penalties)]
    )
    assert torch.equal(draw(model, temperature=0.0, repetition_penalty=penalties).tokens, expected)


def test_fused_and_lora_models_roll_out_as_their_own_generate() -> None:
    model = fuse_head(llama())
    expected = own_greedy(model)
    assert torch.equal(draw(model, temperature=0.0).tokens, expected)
    adapted = get_peft_model(
        llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    tuned = own_greedy(adapted)
    assert torch.equal(draw(adapted, temperature=0.0).tokens, tuned) and not torch.equal(tuned, expected)
    fuse_head(adapted)
    assert torch.equal(draw(adapted, temperature=0.0).tokens, tuned)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7}, {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.01}],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "gemma2-alternating-window", "gpt2", "mistral-window"])
def test_log_probabilities_equal_those_of_a_rescoring_pass(name: str, options: dict[str, Any]) -> None:
    model = build(CONFIGS[name]())
    ids, mask = prompts()
    free = draw(model, **options)
    eos = int(free.tokens[1, 6])
    seen = draw(model, **options, eos_id=eos)
    whole, attention = torch.cat((ids, seen.tokens), 1), torch.cat((mask, seen.mask.long()), 1)
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(input_ids=whole, attention_mask=attention, position_ids=positions).logits[
            :, ids.shape[1] - 1 : -1
        ]
    tempered = token_stats(logits, seen.tokens, temperature=options.get("temperature", 1.0))
    raw = token_stats(logits, seen.tokens)
    close = partial(torch.testing.assert_close, rtol=0, atol=2e-6)
    close(seen.logp + seen.log_kept, tempered.logp * seen.mask)
    close(seen.logp_raw, raw.logp * seen.mask)
    assert raw.entropy is not None
    close(seen.entropy, raw.entropy * seen.mask)
    assert (seen.log_kept < -1e-3).any() == (len(options) > 1)
    assert not seen.mask.all() and seen.logp[seen.mask].min() < -1


def test_the_fused_loss_rescores_a_rollout() -> None:
    model = fuse_head(llama())
    ids, mask = prompts()
    seen = draw(model, temperature=0.7)
    whole, attention = torch.cat((ids, seen.tokens), 1), torch.cat((mask, seen.mask.long()), 1)
    labels = torch.cat((torch.full_like(ids, -100), seen.tokens), 1)
    inputs = {
        "attention_mask": attention,
        "position_ids": (attention.cumsum(1) - 1).clamp(min=0),
        "temperature": 0.7,
    }
    scored = model(input_ids=whole, labels=labels, token_stats=True, **inputs).logp[:, ids.shape[1] - 1 : -1]
    torch.testing.assert_close(seen.logp + seen.log_kept, scored.detach(), rtol=0, atol=2e-6)
    assert not seen.logp.requires_grad


@pytest.mark.parametrize("name", ["llama", "gemma2-alternating-window", "gpt2"])
def test_a_row_draws_the_same_tokens_in_any_batch_slot_and_padding(name: str) -> None:
    model = build(CONFIGS[name]())
    ids, mask = prompts()
    free = draw(model)
    options: dict[str, Any] = {"eos_id": int(free.tokens[1, 6]), "top_p": 0.95}
    together = draw(model, **options)
    alone = [(ids[r : r + 1, mask[r] == 1], mask[r : r + 1, mask[r] == 1]) for r in range(4)]
    wide = (torch.nn.functional.pad(ids, (7, 0), value=5), torch.nn.functional.pad(mask, (7, 0)))
    order = torch.tensor([2, 0, 3, 1, 0])
    moved = draw(model, (wide[0][order], wide[1][order]), sequence_ids=order, **options)
    for row in range(4):
        length = int(together.lengths[row])
        others = [(draw(model, alone[row], sequence_ids=torch.tensor([row]), **options), 0)]
        others += [(moved, int(slot)) for slot in (order == row).nonzero()[:, 0]]
        for other, slot in others:
            assert other.lengths[slot] == length
            assert torch.equal(other.tokens[slot, :length], together.tokens[row, :length])
            torch.testing.assert_close(
                other.logp[slot, :length], together.logp[row, :length], rtol=0, atol=2e-6
            )
    assert not torch.equal(draw(model, seed=8).tokens, free.tokens)


@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_a_prompt_that_holds_the_first_tokens_goes_on_as_the_rollout_did(name: str) -> None:
    model = build(CONFIGS[name]())
    ids, mask = prompts()
    options: dict[str, Any] = {"top_p": 0.95, "repetition_penalty": 1.2}
    whole = draw(model, **options)
    longer = torch.cat((ids, whole.tokens[:, :4]), 1), torch.cat((mask, whole.mask[:, :4].long()), 1)
    rest = draw(model, longer, max_new_tokens=NEW - 4, **options)
    assert torch.equal(rest.tokens, whole.tokens[:, 4:])
    torch.testing.assert_close(rest.logp, whole.logp[:, 4:], rtol=0, atol=2e-6)


def test_positions_key_the_noise_from_each_rows_first_token_on() -> None:
    model = llama()
    lengths = prompts()[1].sum(1)
    free = draw(model)
    assert torch.equal(draw(model, positions=lengths).tokens, free.tokens), (
        "the prompt's length is the default"
    )
    assert torch.equal(draw(model, positions=lengths.int()).tokens, free.tokens)
    moved = draw(model, positions=lengths + torch.tensor([0, 3, 0, 0]))
    assert torch.equal(moved.tokens[[0, 2, 3]], free.tokens[[0, 2, 3]]) and not torch.equal(
        moved.tokens[1], free.tokens[1]
    )
    # One draw of `sample` at the position that a row's first token has.
    ids, mask = prompts()
    logits = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[
        :, -1
    ]
    assert torch.equal(
        draw(model, positions=lengths + 40).tokens[:, 0], sample(logits, seed=7, positions=lengths + 40).token
    )


def test_seen_ids_join_the_prompts_under_the_penalty() -> None:
    model = llama()
    ids, _ = prompts()
    free = draw(model, temperature=0.0, repetition_penalty=1.4).tokens
    marked = torch.zeros(4, 4, dtype=torch.int32)
    first = int(free[1, 0])
    marked[1, first // 32] = 1 << first % 32 if first % 32 < 31 else -(2**31)

    class Marked(tf.RepetitionPenaltyLogitsProcessor):  # transformers' own, told of one more id in row 1
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            extra = torch.full((4, 1), PAD)
            extra[1] = first
            return super().__call__(torch.cat((extra, input_ids), 1), scores)

    processors = tf.LogitsProcessorList([Marked(1.4)])
    own = model.generate(
        ids,
        attention_mask=prompts()[1],
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=PAD,
        logits_processor=processors,
    )
    seen = draw(model, temperature=0.0, repetition_penalty=1.4, seen=marked).tokens
    assert seen[1, 0] != first and torch.equal(seen[1], own[1, ids.shape[1] :])
    assert torch.equal(seen[[0, 2, 3]], free[[0, 2, 3]])
    assert torch.equal(
        draw(model, temperature=0.0, seen=marked).tokens, draw(model, temperature=0.0).tokens
    ), "no penalty, no effect"


def test_finished_rows_draw_nothing_and_leave_the_others_as_they_are() -> None:
    model = llama()
    free = draw(model)
    finished = torch.tensor([False, True, False, True])

    def poison(logits: Tensor, _: int) -> None:
        logits[finished] = math.nan  # nobody reads them

    with calls_of(model, poison):
        seen = draw(model, finished=finished, pad_id=4)
    assert seen.lengths.tolist() == [NEW, 0, NEW, 0] and not finished.equal(seen.mask.any(1))
    assert (seen.tokens[finished] == 4).all() and not torch.stack(seen[2:6])[:, finished].any()
    assert torch.equal(seen.tokens[~finished], free.tokens[~finished]) and torch.equal(
        seen.logp[~finished], free.logp[~finished]
    )
    assert finished.tolist() == [False, True, False, True], "the argument is not written to"
    nothing = draw(model, finished=torch.ones(4, dtype=torch.bool))
    assert nothing.tokens.shape == (4, 0) and nothing.lengths.tolist() == [0] * 4


def test_check_looks_after_every_step() -> None:
    model = llama()

    def poison(logits: Tensor, number: int) -> None:
        if number >= 2:
            logits[1] = math.nan

    for check, steps in ((False, POLL), (True, 3)):
        with (
            calls_of(model, poison) as calls,
            pytest.raises(FloatingPointError, match=r"at step 2 \(from 0\) in 1 rows, \[1\]"),
        ):
            draw(model, check=check)
        assert len(calls) == steps
    assert torch.equal(draw(model, check=True).tokens, draw(model).tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    ids, mask = prompts()
    seen = draw(llama().to(dtype), (ids.int(), mask.bool()))
    expected = draw(llama().to(dtype))
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    assert {field.dtype for field in seen[2:6]} == {
        torch.promote_types(dtype, torch.float32)
    } and seen.mask.all()


def test_under_autocast() -> None:
    model = llama()
    with torch.autocast("cpu", torch.bfloat16):
        seen, expected = draw(model, temperature=0.0), own_greedy(model)
    assert torch.equal(seen.tokens, expected)
    assert not torch.equal(seen.logp_raw, draw(model, temperature=0.0).logp_raw)


def test_equal_prompts_differ_by_their_sequence_id_and_repeat_with_it() -> None:
    model = llama()
    ids, mask = prompts((5,) * 4, 5)
    same = ids[:1].expand(4, -1), mask
    assert len(draw(model, same).tokens.unique(dim=0)) == 4
    assert len(draw(model, same, sequence_ids=torch.tensor([1, 1, 1, 1])).tokens.unique(dim=0)) == 1


def test_rows_end_with_any_of_the_eos_ids_and_are_padded_behind_it() -> None:
    model = llama()
    free = draw(model)
    assert free.lengths.tolist() == [NEW] * 4 and free.mask.all()
    eos = [int(free.tokens[0, 2]), int(free.tokens[1, 5]), int(free.tokens[2, 0]), int(free.tokens[3, 3])]
    seen = draw(model, eos_id=eos, pad_id=4)
    ends = torch.isin(free.tokens, torch.tensor(eos)).int().argmax(1) + 1
    assert (
        torch.equal(seen.lengths, ends)
        and seen.tokens.shape[1] == ends.max() < NEW
        and len(ends.unique()) > 2
    )
    assert torch.equal(seen.mask, torch.arange(int(ends.max())) < ends[:, None])
    for name, field, without in zip(Rollout._fields[2:6], seen[2:6], free[2:6], strict=True):
        assert torch.equal(field, without[:, : ends.max()] * seen.mask), name
        assert field.dtype == torch.float32 and field.is_contiguous()
    assert torch.equal(seen.tokens, free.tokens[:, : ends.max()].where(seen.mask, 4))
    assert (seen.tokens.dtype, seen.mask.dtype, seen.lengths.dtype) == (torch.int64, torch.bool, torch.int64)


def test_filters() -> None:
    model = llama()
    ids, _ = prompts()
    greedy = draw(model, temperature=0.0).tokens
    one = draw(model, top_k=1)
    assert torch.equal(one.tokens, greedy) and (one.logp == 0).all() and (one.log_kept < 0).all()
    assert torch.equal(draw(model, top_p=1e-6).tokens, greedy) and torch.equal(
        draw(model, min_p=1.0).tokens, greedy
    )
    three = draw(model, top_k=3, temperature=3.0)
    whole, attention = torch.cat((ids, three.tokens), 1), torch.cat((prompts()[1], three.mask.long()), 1)
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=whole, attention_mask=attention, position_ids=positions).logits[
        :, ids.shape[1] - 1 : -1
    ]
    best = logits.topk(3).indices
    used = [(best[..., k] == three.tokens).any() for k in range(3)]
    assert (best == three.tokens[..., None]).any(-1).all() and all(used)
    allowed = torch.zeros(4, 4, dtype=torch.int32)
    allowed[:, 1] = 0b1010  # 33 and 35
    assert draw(model, allowed=allowed).tokens.unique().tolist() == [33, 35]


def test_a_temperature_for_each_row() -> None:
    model = llama()
    temperatures = torch.tensor([0.0, 0.7, 1.0, 2.5])
    seen = draw(model, temperature=temperatures)
    for row, temperature in enumerate(temperatures.tolist()):
        alone = draw(model, temperature=temperature)
        assert torch.equal(seen.tokens[row], alone.tokens[row]) and torch.equal(
            seen.logp[row], alone.logp[row]
        )


def test_the_model_runs_once_a_token_and_stops_at_the_first_look_after_the_last_end() -> None:
    model = llama()

    def check_width(logits: Tensor, _: int) -> None:
        assert logits.shape[:2] == (4, 1)  # of the last token only

    with calls_of(model, check_width) as calls:
        free = draw(model, max_new_tokens=4 * POLL + 3)
    assert calls == [9] + [1] * (4 * POLL + 2) and free.tokens.shape[1] == 4 * POLL + 3
    with calls_of(model) as calls:
        draw(model, max_new_tokens=1)
    assert calls == [9]
    row = 2
    eos = int(free.tokens[row, POLL + 1])
    length = int((free.tokens[row] == eos).int().argmax()) + 1
    one = prompts()[0][row : row + 1], prompts()[1][row : row + 1]
    with calls_of(model) as calls:
        ended = draw(model, one, max_new_tokens=4 * POLL, eos_id=eos, sequence_ids=torch.tensor([row]))
    assert ended.lengths.tolist() == [length] and ended.tokens.shape == (1, length)
    assert len(calls) == math.ceil(length / POLL) * POLL < 4 * POLL


def test_every_position_of_the_model_can_be_used() -> None:
    model = build(tf.GPT2Config(**{**GPT, "n_positions": 12}))
    ids, mask = prompts((4, 2), 9)  # 9 columns, but 4 positions
    assert draw(model, (ids, mask), max_new_tokens=8).lengths.tolist() == [8, 8]
    with pytest.raises(
        ValueError, match=r"max_new_tokens: 9 seen behind a prompt of 4 tokens, at most 12 positions"
    ):
        draw(model, (ids, mask), max_new_tokens=9)


IDS, MASK = prompts()
RIGHT, HOLE, EMPTY = MASK.flip(1), MASK.clone(), MASK.clone()
HOLE[0, 4], EMPTY[3] = 0, 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": IDS[0]}, r"input_ids: shape \[9\] seen, \[B, T\]"),
        ({"input_ids": IDS[:0]}, r"input_ids: shape \[0, 9\] seen"),
        ({"input_ids": IDS.float()}, r"input_ids: torch.float32 seen, torch.int64 or torch.int32 wanted"),
        ({"input_ids": IDS + 50}, r"input_ids: \[50, \d+\] seen, ids in \[0, 97\) wanted"),
        ({"input_ids": IDS - 1}, r"input_ids: \[-1, \d+\] seen"),
        ({"attention_mask": MASK[:, 1:]}, r"attention_mask: shape \[4, 8\] seen, \[B, T\] = \[4, 9\] wanted"),
        ({"attention_mask": MASK.float()}, r"attention_mask: torch.float32 seen"),
        ({"attention_mask": RIGHT}, r"attention_mask: 3 rows, \[1, 2, 3\] first, .* padded on the left"),
        ({"attention_mask": HOLE}, r"attention_mask: 1 rows, \[0\] first"),
        ({"attention_mask": EMPTY}, r"attention_mask: 1 rows, \[3\] first, .* at least one token"),
        ({"attention_mask": MASK * 2}, r"attention_mask: 4 rows"),
        ({"attention_mask": MASK - 1}, r"attention_mask: 4 rows"),
        ({"max_new_tokens": 0}, r"max_new_tokens: 0 seen, a whole number >= 1 wanted"),
        ({"max_new_tokens": 2.0}, r"max_new_tokens: 2.0 seen"),
        (
            {"max_new_tokens": 56},
            r"max_new_tokens: 56 seen behind a prompt of 9 tokens, at most 64 positions",
        ),
        ({"eos_id": [2, 97]}, r"eos_id: \[2, 97\] seen, ids in \[0, 97\) wanted"),
        ({"pad_id": -1}, r"pad_id: \[-1\] seen"),
        ({"seed": -1}, r"seed: -1 seen"),
        ({"temperature": -0.5}, r"temperature: -0.5 seen"),
        ({"top_p": torch.tensor([1.0, 2.0, 1.0, 1.0])}, r"top_p: .* seen, numbers in \[0, 1\] wanted"),
        (
            {"repetition_penalty": torch.ones(3)},
            r"repetition_penalty: shape \[3\] seen, \[B\] = \[4\] wanted",
        ),
        ({"sequence_ids": torch.arange(3)}, r"sequence_ids: shape \[3\] seen"),
        ({"positions": torch.arange(3)}, r"positions: shape \[3\] seen"),
        (
            {"positions": torch.arange(4) - 1},
            r"positions: \[-1, 0, 1, 2\] seen, whole numbers in \[0, 2\^32\) wanted",
        ),
        (
            {"positions": torch.arange(4) + 2**32 - 6},
            r"positions: got .*, expected numbers below 2\^32 - max_new_tokens",
        ),
        ({"finished": torch.zeros(4)}, r"finished: torch.float32 seen, torch.bool wanted"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named_before_the_model_runs(change: dict[str, Any], message: str) -> None:
    model = llama()
    arguments = {
        "input_ids": IDS,
        "attention_mask": MASK,
        "max_new_tokens": 3,
        "seed": 0,
        "eos_id": 2,
        "pad_id": 0,
        **change,
    }
    with calls_of(model) as calls, pytest.raises(ValueError, match=message):
        generate(model, **arguments)
    assert not calls


def _mamba() -> Any:
    return build(tf.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4))


def _flash() -> Any:
    model = llama()
    model.config._attn_implementation = "flash_attention_2"
    return model


def _ignores_its_cache() -> Any:
    model = llama()
    forward = model.model.forward
    model.model.forward = lambda *args, **kwargs: forward(
        *args, **{name: value for name, value in kwargs.items() if name != CACHE}
    )
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_mamba, "MambaForCausalLM keeps another state"),
        (
            lambda: build(tf.Lfm2Config(**GQA, layer_types=["conv", "full_attention"])),
            "Lfm2ForCausalLM keeps .*LinearAttentionLayer",
        ),
        (
            lambda: tf.T5ForConditionalGeneration(
                tf.T5Config(vocab_size=VOCAB, d_model=32, num_layers=1, num_heads=4, d_ff=48)
            ),
            "T5ForConditionalGeneration is an encoder-decoder",
        ),
        (lambda: llama().model, "LlamaModel has no language-model head"),
        (lambda: torch.nn.Sequential(llama()), "Sequential is no transformers PreTrainedModel"),
        (_flash, "LlamaForCausalLM has attention 'flash_attention_2'"),
        (
            lambda: get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
            "LlamaForCausalLM has PEFT's virtual tokens",
        ),
        (_ignores_its_cache, r"LlamaForCausalLM was given 9 tokens and wrote \[0, 0\]"),
    ],
    ids=["mamba", "lfm2", "t5", "headless", "wrapped", "flash", "prompt-tuning", "uncached"],
)
def test_models_without_a_static_cache_are_refused_by_name(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        draw(make())


def test_training_flags_and_rng_are_restored_and_checkpointing_does_not_break_the_cache() -> None:
    model = llama(attention_dropout=0.5)
    expected = draw(model)
    model.train()
    model.gradient_checkpointing_enable()
    model.model.layers[1].eval()
    training, rng = [m.training for m in model.modules()], torch.get_rng_state()
    with calls_of(model) as calls:
        seen = draw(model)
    assert calls == [9] + [1] * (NEW - 1)
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    assert [m.training for m in model.modules()] == training and torch.equal(torch.get_rng_state(), rng)
    with pytest.raises(ValueError, match="allowed"):
        draw(model, allowed=torch.zeros(4, 9, dtype=torch.int32))  # seen at the first draw only
    with pytest.raises(
        ValueError, match=r"seen: shape \[4, 9\] seen, \[B, ceil\(V / 32\)\] = \[4, 4\] wanted"
    ):
        draw(model, seen=torch.zeros(4, 9, dtype=torch.int32))
    assert [m.training for m in model.modules()] == training


@pytest.mark.parametrize("call", [0, 2, NEW - 1])
def test_logits_that_are_not_finite_end_the_rollout(call: int) -> None:
    model = llama()

    def poison(logits: Tensor, number: int) -> None:
        if number >= call:
            logits[[1, 3]] = math.nan
        if number > call:
            logits[0] = math.nan

    with (
        calls_of(model, poison) as calls,
        pytest.raises(FloatingPointError, match=rf"at step {call} \(from 0\) in 2 rows, \[1, 3\]"),
    ):
        draw(model)
    assert len(calls) <= max(call + 1, POLL)


def test_nothing_allowed_ends_the_rollout() -> None:
    with pytest.raises(FloatingPointError, match=r"no finite allowed logit at step 0 \(from 0\) in 4 rows"):
        draw(llama(), allowed=torch.zeros(4, 4, dtype=torch.int32))


def test_progress_counts_the_steps_at_each_look(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    free = draw(model)
    assert capsys.readouterr().err == ""
    draw(model, progress=True)
    assert f"{NEW}/{NEW}" in capsys.readouterr().err
    draw(model, progress=True, eos_id=free.tokens.unique().tolist(), max_new_tokens=40)
    assert f"{POLL}/40" in capsys.readouterr().err
    updates: list[int] = []

    class Bar(module.tqdm):
        def update(self, n: int = 1) -> None:
            updates.append(n)
            super().update(n)

    monkeypatch.setattr(module, "tqdm", Bar)
    draw(model, progress=True, max_new_tokens=2 * POLL + 3)
    assert updates == [POLL, POLL, 3]


def host_state(layers: list[Any]) -> list[dict[str, Any]]:
    return [
        {key: id(value) if isinstance(value, Tensor) else value for key, value in vars(layer).items()}
        for layer in layers
    ]


@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, "sdpa") for name in ("llama", "qwen3-tied", "mistral-window", "gpt2")]
    + [(name, "eager") for name in ("llama", "gemma2-alternating-window", "gpt2")],
)
def test_a_step_reads_nothing_back_from_the_device(
    name: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = module.sample

    def sample_as_on_a_gpu(
        *args: Any, **kwargs: Any
    ) -> Any:  # which leaves the values of tensors unchecked, as a traced one does
        with mock.patch("torch.compiler.is_compiling", lambda: True):
            return own(*args, **kwargs)

    monkeypatch.setattr(module, "sample", sample_as_on_a_gpu)
    monkeypatch.setattr(module, "_check_written", lambda *_: None)  # after the prefill, and it reads
    options: dict[str, Any] = {"seed": 0, "temperature": torch.ones(2), "repetition_penalty": 1.2}
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.no_grad(),
    ):  # its tensors have no values: reading one raises
        model = tf.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation=attention).eval()
        state = module._Decoding(
            model, model, torch.ones(2, 5).long(), torch.ones(2, 5).long(), 20, [2], PAD, options
        )
        tensors = {key: value for key, value in vars(state).items() if isinstance(value, Tensor)}
        host = host_state(state.cache.layers)
        for _ in range(2):
            state.step()
        with pytest.raises(DataDependentOutputException):
            state.all_ended()
    # A graph replays addresses, and nothing that Python counts.
    assert all(getattr(state, key) is value for key, value in tensors.items())
    assert host_state(state.cache.layers) == host


def test_a_captured_step_runs_for_real_in_the_warm_up_and_by_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of CUDA calls, with stand-ins: a capture runs nothing, so each step must come of the warm-up
    or of a replay."""
    log: list[str] = []

    class Stream:
        def __init__(self, name: str = "side") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            log.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    @contextmanager
    def inside(*what: Any, **options: Any):
        log.append(
            f"in {what[0].name}" if isinstance(what[0], Stream) else f"capture on {options['stream'].name}"
        )
        yield

    for name, stand_in in {
        "Stream": Stream,
        "CUDAGraph": Graph,
        "stream": inside,
        "graph": inside,
        "current_stream": lambda: Stream("main"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    steps = module._run(lambda: log.append("step"), capture=True)
    for _ in range(WARM_UP + 3):
        next(steps)
    warm_up = ["side waits for main", "in side", "step", "main waits for side"]
    assert log == warm_up * WARM_UP + ["capture on side", "step"] + ["replay"] * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", CONFIGS)
def test_on_a_gpu_a_captured_rollout_equals_an_eager_one(name: str) -> None:
    model = build(CONFIGS[name]()).cuda()
    ids, mask = (tensor.cuda() for tensor in prompts())
    eos = int(draw(model, (ids, mask), max_new_tokens=40).tokens[0, 20])
    options = {"max_new_tokens": 40, "eos_id": eos, "top_p": 0.95, "repetition_penalty": 1.1}
    eager, captured = (draw(model, (ids, mask), **options, cuda_graph=graph) for graph in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))


def test_prompt_bits() -> None:
    ids = torch.tensor([[0, 0, 31, 31, 95, 64, 64], [5, 96, 0, 1, 63, 32, 0], [7, 7, 7, 7, 7, 7, 9]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7, [0, 0, 0, 0, 0, 0, 1]])
    words = module._bits(ids, mask, VOCAB)
    assert words.dtype == torch.int32 and words.shape == (3, 4)
    marked = [{v for v in range(128) if int(row[v // 32]) >> v % 32 & 1} for row in words]
    assert marked == [{31, 95, 64}, {5, 96, 0, 1, 63, 32}, {9}]


def own_call(model: Any, **options: Any) -> Any:
    ids, mask = prompts()
    arguments = {"max_new_tokens": NEW, "pad_token_id": PAD, "custom_generate": custom_generate, **options}
    return model.generate(input_ids=ids, attention_mask=mask, **arguments)


@pytest.mark.parametrize("name", ["llama", "gemma2-alternating-window", "gpt2"])
def test_custom_generate_is_greedy_as_generate(name: str) -> None:
    model = build(CONFIGS[name]())
    ids, _ = prompts()
    for options in (
        {},
        {"repetition_penalty": 1.4},
        {"num_return_sequences": 1, "max_new_tokens": None, "max_length": 15},
    ):
        own = own_call(model, do_sample=False, custom_generate=None, **options)
        assert torch.equal(own_call(model, do_sample=False, **options), own)
        eos = [int(own[0, 12]), int(own[1, 13])]
        own = own_call(model, do_sample=False, custom_generate=None, eos_token_id=eos, **options)
        assert torch.equal(own_call(model, do_sample=False, eos_token_id=eos, **options), own)
    whole = ids[:1].expand(2, -1)  # without padding, transformers hands over no mask
    own = model.generate(whole, max_new_tokens=5, do_sample=False)
    assert torch.equal(
        model.generate(whole, max_new_tokens=5, do_sample=False, custom_generate=custom_generate), own
    )


def test_custom_generate_counts_the_padding_that_a_penalty_does_not_ignore() -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[PAD] = 2 * model.lm_head.weight[41]  # often drawn, so that its penalty is seen
    counts = {"logits_processor": [tf.RepetitionPenaltyLogitsProcessor(1.4)], "do_sample": False}
    own = own_call(model, custom_generate=None, **counts)
    assert torch.equal(own_call(model, **counts), own)
    assert torch.equal(own_call(model, repetition_penalty=1.4, do_sample=False), own) == PADDING_COUNTS
    ignores = {
        "logits_processor": [tf.RepetitionPenaltyLogitsProcessor(1.4, prompt_ignore_length=2)],
        "do_sample": False,
    }
    ids, mask = prompts((7, 7))
    batch = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": NEW, "pad_token_id": PAD}
    assert torch.equal(
        model.generate(**batch, **ignores, custom_generate=custom_generate),
        model.generate(**batch, **ignores),
    )


def test_custom_generate_samples_with_the_configs_options_and_torchs_seed() -> None:
    model = llama()
    ids, mask = prompts()
    for asked, options in (
        ({"top_k": 0}, {}),
        ({}, {"top_k": 50}),  # transformers' default
        (
            {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
            {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
        ),
    ):
        torch.manual_seed(3)
        first, second = own_call(model, do_sample=True, **asked), own_call(model, do_sample=True, **asked)
        torch.manual_seed(3)
        output = own_call(model, do_sample=True, return_dict_in_generate=True, **asked)
        assert torch.equal(output.sequences, first) and not torch.equal(second, first)
        torch.manual_seed(3)
        seen = module._bits(ids, mask == 0, VOCAB) if PADDING_COUNTS else None
        expected = draw(model, seed=int(torch.randint(2**63 - 1, ())), seen=seen, **options)
        assert isinstance(output, RolloutOutput) and output.rollout is not None
        assert torch.equal(first, torch.cat((ids, expected.tokens), 1))
        assert all(torch.equal(a, b) for a, b in zip(output.rollout, expected, strict=True))
    several = own_call(model, do_sample=True, num_return_sequences=3)
    assert several.shape == (12, 9 + NEW) and len(several[:3].unique(dim=0)) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "mode 'beam_search'"),
        ({"min_new_tokens": 3, "eos_token_id": 2}, "MinLengthLogitsProcessor seen"),
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor"),
        ({"typical_p": 0.9, "do_sample": True}, "TypicalLogitsWarper"),
        (
            {"logits_processor": [tf.TemperatureLogitsWarper(0.5)], "temperature": 0.7, "do_sample": True},
            "TemperatureLogitsWarper",
        ),
        (
            {"logits_processor": [tf.RepetitionPenaltyLogitsProcessor(1.2, prompt_ignore_length=9)]},
            "prompt_ignore_length 9 seen",
        ),
        ({"logits_processor": [tf.MinPLogitsWarper(0.5, min_tokens_to_keep=2)]}, "min_tokens_to_keep 2"),
        ({"max_time": 1.0}, "stopping_criteria: MaxTimeCriteria"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores: True seen"),
        ({"position_ids": torch.arange(9).expand(4, -1)}, "position_ids: others than"),
        ({CACHE: None, "output_attentions": True}, "output_attentions: True seen"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_custom_generate_refuses_what_it_does_not_do(options: dict[str, Any], message: str) -> None:
    model = llama()
    with calls_of(model) as calls, pytest.raises(ValueError, match=message):
        own_call(model, **{"do_sample": False, **options})
    assert not calls


def test_custom_generate_refuses_a_cache_that_holds_tokens_and_other_inputs() -> None:
    model = llama()
    ids, mask = prompts()
    cache = tf.DynamicCache(config=model.config)
    model(input_ids=ids[:, :4], attention_mask=mask[:, :4], **{CACHE: cache})
    with pytest.raises(ValueError, match=f"{CACHE}: a DynamicCache of 4 tokens seen"):
        own_call(model, **{CACHE: cache})
    with pytest.raises(ValueError, match="inputs_embeds"):
        model.generate(inputs_embeds=torch.zeros(1, 3, 32), max_new_tokens=2, custom_generate=custom_generate)
