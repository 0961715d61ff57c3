"""What a rollout refuses, restores and says."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor

from fastalign.probe import UnsupportedModelError
from fastalign.rollout import generate, generation
from fastalign.rollout.generation import POLL
from fastalign.transformers_names import CACHE
from tests.rollout.tiny_rollouts import GQA, NEW, VOCAB, assert_same, build, calls_of, draw, llama, prompts

pytestmark = pytest.mark.hosts


IDS, MASK = prompts()


RIGHT, HOLE, EMPTY = MASK.flip(1), MASK.clone(), MASK.clone()


HOLE[0, 4], EMPTY[3] = 0, 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": IDS[0]}, r"input_ids: got shape \[9\], expected \[B, T\]"),
        ({"input_ids": IDS[:0]}, r"input_ids: got shape \[0, 9\]"),
        ({"input_ids": IDS.float()}, r"input_ids: got torch.float32, expected torch.int64 or torch.int32"),
        ({"input_ids": IDS + 50}, r"input_ids: got \[50, \d+\], expected ids in \[0, 97\)"),
        ({"input_ids": IDS - 1}, r"input_ids: got \[-1, \d+\]"),
        (
            {"attention_mask": MASK[:, 1:]},
            r"attention_mask: got shape \[4, 8\], expected \[B, T\] = \[4, 9\]",
        ),
        ({"attention_mask": None}, "attention_mask: got None, expected a torch.Tensor"),
        ({"attention_mask": MASK.float()}, r"attention_mask: got torch.float32"),
        ({"attention_mask": RIGHT}, r"attention_mask: got 3 rows, \[1, 2, 3\] first, .* padded on the left"),
        ({"attention_mask": HOLE}, r"attention_mask: got 1 rows, \[0\] first"),
        ({"attention_mask": EMPTY}, r"attention_mask: got 1 rows, \[3\] first, .* at least one token"),
        ({"attention_mask": MASK * 2}, r"attention_mask: got 4 rows"),
        ({"attention_mask": MASK - 1}, r"attention_mask: got 4 rows"),
        ({"max_new_tokens": 0}, r"max_new_tokens: got 0, expected a whole number from 1 on"),
        ({"max_new_tokens": 2.0}, r"max_new_tokens: got 2.0"),
        (
            {"max_new_tokens": 56},
            r"max_new_tokens: got 56 after a prompt of 9 tokens, expected at most 64 positions",
        ),
        ({"eos_id": [2, 97]}, r"eos_id: got \[2, 97\], expected ids in \[0, 97\)"),
        ({"eos_id": 2.0}, r"eos_id: got \[2.0\]"),
        ({"eos_id": True}, r"eos_id: got \[True\]"),
        ({"eos_id": "2"}, r"eos_id: got \['2'\]"),
        ({"max_new_tokens": True}, r"max_new_tokens: got True"),
        ({"check": "yes"}, r"check: got 'yes', expected True or False"),
        ({"progress": 1}, r"progress: got 1"),
        ({"cuda_graph": None}, r"cuda_graph: got None"),
        ({"compile": "no"}, r"compile: got 'no'"),
        ({"seen": [1]}, r"seen: got a list, expected a torch.Tensor"),
        ({"allowed": torch.ones(4, 4)}, r"allowed: got torch.float32, expected torch.int32"),
        ({"allowed": torch.ones(3, 4, dtype=torch.int32)}, r"allowed: got shape \[3, 4\]"),
        ({"pad_id": -1}, r"pad_id: got \[-1\]"),
        ({"seed": -1}, r"seed: got -1"),
        ({"temperature": -0.5}, r"temperature: got -0.5"),
        ({"top_p": torch.tensor([1.0, 2.0, 1.0, 1.0])}, r"top_p: got .*, expected numbers in \[0, 1\]"),
        (
            {"repetition_penalty": torch.ones(3)},
            r"repetition_penalty: got shape \[3\], expected \[B\] = \[4\]",
        ),
        ({"sequence_ids": torch.arange(3)}, r"sequence_ids: got shape \[3\]"),
        ({"positions": torch.arange(3)}, r"positions: got shape \[3\]"),
        (
            {"positions": torch.arange(4) - 1},
            r"positions: got \[-1, 0, 1, 2\], expected whole numbers in \[0, 2\^32\)",
        ),
        (
            {"positions": torch.arange(4) + 2**32 - 6},
            r"positions: got .*, expected numbers below 2\^32 - max_new_tokens",
        ),
        ({"finished": torch.zeros(4)}, r"finished: got torch.float32, expected torch.bool"),
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
        (_mamba, "MambaForCausalLM, which keeps another state"),
        (
            lambda: build(tf.Lfm2Config(**GQA, layer_types=["conv", "full_attention"])),
            "Lfm2ForCausalLM, which keeps .*LinearAttentionLayer",
        ),
        (
            lambda: tf.T5ForConditionalGeneration(
                tf.T5Config(vocab_size=VOCAB, d_model=32, num_layers=1, num_heads=4, d_ff=48)
            ),
            "T5ForConditionalGeneration, which is an encoder-decoder",
        ),
        (lambda: llama().model, "LlamaModel, which has no language-model head"),
        (lambda: torch.nn.Sequential(llama()), "Sequential, which is no transformers PreTrainedModel"),
        (_flash, "LlamaForCausalLM, which has attention 'flash_attention_2'"),
        (
            lambda: get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
            "LlamaForCausalLM, which has PEFT's virtual tokens",
        ),
        (_ignores_its_cache, r"LlamaForCausalLM, which wrote \[0, 0\] tokens .*, expected the 9"),
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
    assert_same(seen, expected)
    assert [m.training for m in model.modules()] == training and torch.equal(torch.get_rng_state(), rng)
    with pytest.raises(ValueError, match="allowed"):
        draw(model, allowed=torch.zeros(4, 9, dtype=torch.int32))  # seen at the first draw only
    with pytest.raises(
        ValueError, match=r"seen: got shape \[4, 9\], expected \[B, ceil\(V / 32\)\] = \[4, 4\]"
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

    class Bar(generation.tqdm):
        def update(self, n: int = 1) -> None:
            updates.append(n)
            super().update(n)

    monkeypatch.setattr(generation, "tqdm", Bar)
    draw(model, progress=True, max_new_tokens=2 * POLL + 3)
    assert updates == [POLL, POLL, 3]
