"""Rollouts of tiny random transformers models against transformers' own generate, a rescoring pass, and
themselves in other batches."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import Tensor

from fastalign import sample, token_stats
from fastalign.causal_lm import fuse_head
from fastalign.rollout import Rollout
from fastalign.rollout.generation import POLL
from tests.rollout.tiny_rollouts import (
    CONFIGS,
    GPT,
    NEW,
    PAD,
    assert_same,
    build,
    calls_of,
    draw,
    llama,
    prompts,
)

pytestmark = pytest.mark.hosts


def greedy_alone(model: Any, eos_id: Any = None, **options: Any) -> Tensor:
    """What transformers' generate draws for each prompt alone: some of its versions let a penalty count the
    padding of a batch."""
    arguments = {
        "max_new_tokens": NEW,
        "do_sample": False,
        "eos_token_id": eos_id,
        "pad_token_id": PAD,
        **options,
    }
    rows = [row[on.bool()][None] for row, on in zip(*prompts(), strict=True)]
    drawn = [
        model.generate(input_ids=row, attention_mask=torch.ones_like(row), **arguments)[0, row.shape[1] :]
        for row in rows
    ]
    return torch.nn.utils.rnn.pad_sequence(drawn, batch_first=True, padding_value=PAD)


@pytest.mark.parametrize("penalty", [1.0, 1.4])
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_equal_transformers_generate(name: str, penalty: float) -> None:
    model = build(CONFIGS[name]())
    expected = greedy_alone(model, repetition_penalty=penalty)
    assert len(expected.unique()) > 3
    assert torch.equal(draw(model, temperature=0.0, repetition_penalty=penalty).tokens, expected)
    eos = [int(expected[0, 4]), int(expected[2, 9])]
    ended = draw(model, temperature=0.0, repetition_penalty=penalty, eos_id=eos)
    assert (
        torch.equal(ended.tokens, greedy_alone(model, eos, repetition_penalty=penalty))
        and not ended.mask.all()
    )


def test_the_penalty_of_each_row_is_its_own() -> None:
    model = llama()
    penalties = torch.tensor([1.0, 1.4, 1.0, 2.0])
    expected = torch.stack(
        [greedy_alone(model, repetition_penalty=float(p))[row] for row, p in enumerate(penalties)]
    )
    assert torch.equal(draw(model, temperature=0.0, repetition_penalty=penalties).tokens, expected)


def test_fused_and_lora_models_roll_out_as_their_own_generate() -> None:
    model = fuse_head(llama())
    expected = greedy_alone(model)
    assert torch.equal(draw(model, temperature=0.0).tokens, expected)
    adapted = get_peft_model(
        llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    tuned = greedy_alone(adapted)
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
        pairs = [(draw(model, alone[row], sequence_ids=torch.tensor([row]), **options), 0)]
        pairs += [(moved, int(slot)) for slot in (order == row).nonzero()[:, 0]]
        for other, slot in pairs:
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
    expected = model.generate(
        ids,
        attention_mask=prompts()[1],
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=PAD,
        logits_processor=processors,
    )
    seen = draw(model, temperature=0.0, repetition_penalty=1.4, seen=marked).tokens
    assert seen[1, 0] != first and torch.equal(seen[1], expected[1, ids.shape[1] :])
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
    assert_same(seen, expected)
    assert {field.dtype for field in seen[2:6]} == {
        torch.promote_types(dtype, torch.float32)
    } and seen.mask.all()


def test_under_autocast() -> None:
    model = llama()
    with torch.autocast("cpu", torch.bfloat16):
        seen, expected = draw(model, temperature=0.0), greedy_alone(model)
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
        ValueError, match=r"max_new_tokens: got 9 after a prompt of 4 tokens, expected at most 12 positions"
    ):
        draw(model, (ids, mask), max_new_tokens=9)
