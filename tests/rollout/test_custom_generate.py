"""`model.generate(custom_generate=...)` against transformers' generate and `rollout.generate`."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers as tf

from fastalign.rollout import RolloutOutput, custom_generate, decoding
from fastalign.transformers_names import CACHE
from tests.rollout.tiny_rollouts import (
    CONFIGS,
    NEW,
    PAD,
    VOCAB,
    assert_same,
    build,
    calls_of,
    draw,
    llama,
    prompts,
)

pytestmark = pytest.mark.hosts


# Whether transformers' generate lets a penalty count padding. It hands over a tensor of lengths to ignore
# where the processor takes one.
PADDING_COUNTS = "Tensor" not in str(
    inspect.signature(tf.RepetitionPenaltyLogitsProcessor).parameters["prompt_ignore_length"]
)


def generate(model: Any, **options: Any) -> Any:
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
        expected = generate(model, do_sample=False, custom_generate=None, **options)
        assert torch.equal(generate(model, do_sample=False, **options), expected)
        eos = [int(expected[0, 12]), int(expected[1, 13])]
        expected = generate(model, do_sample=False, custom_generate=None, eos_token_id=eos, **options)
        assert torch.equal(generate(model, do_sample=False, eos_token_id=eos, **options), expected)
    whole = ids[:1].expand(2, -1)  # without padding, transformers hands over no mask
    expected = model.generate(whole, max_new_tokens=5, do_sample=False)
    assert torch.equal(
        model.generate(whole, max_new_tokens=5, do_sample=False, custom_generate=custom_generate), expected
    )


def test_custom_generate_counts_the_padding_that_a_penalty_does_not_ignore() -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[PAD] = 2 * model.lm_head.weight[41]  # often drawn, so that its penalty is seen
    counts = {"logits_processor": [tf.RepetitionPenaltyLogitsProcessor(1.4)], "do_sample": False}
    expected = generate(model, custom_generate=None, **counts)
    assert torch.equal(generate(model, **counts), expected)
    assert torch.equal(generate(model, repetition_penalty=1.4, do_sample=False), expected) == PADDING_COUNTS
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
        first, second = generate(model, do_sample=True, **asked), generate(model, do_sample=True, **asked)
        torch.manual_seed(3)
        output = generate(model, do_sample=True, return_dict_in_generate=True, **asked)
        assert torch.equal(output.sequences, first) and not torch.equal(second, first)
        torch.manual_seed(3)
        seen = decoding.id_bits(ids, mask == 0, VOCAB) if PADDING_COUNTS else None
        expected = draw(model, seed=int(torch.randint(2**63 - 1, ())), seen=seen, **options)
        assert isinstance(output, RolloutOutput) and output.rollout is not None
        assert torch.equal(first, torch.cat((ids, expected.tokens), 1))
        assert_same(output.rollout, expected)
    several = generate(model, do_sample=True, num_return_sequences=3)
    assert several.shape == (12, 9 + NEW) and len(several[:3].unique(dim=0)) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "mode 'beam_search'"),
        ({"min_new_tokens": 3, "eos_token_id": 2}, "got MinLengthLogitsProcessor"),
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor"),
        ({"typical_p": 0.9, "do_sample": True}, "TypicalLogitsWarper"),
        (
            {"logits_processor": [tf.TemperatureLogitsWarper(0.5)], "temperature": 0.7, "do_sample": True},
            "TemperatureLogitsWarper",
        ),
        (
            {"logits_processor": [tf.RepetitionPenaltyLogitsProcessor(1.2, prompt_ignore_length=9)]},
            "got prompt_ignore_length 9",
        ),
        ({"logits_processor": [tf.MinPLogitsWarper(0.5, min_tokens_to_keep=2)]}, "min_tokens_to_keep 2"),
        ({"max_time": 1.0}, "stopping_criteria: got MaxTimeCriteria"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores: got True"),
        ({"position_ids": torch.arange(9).expand(4, -1)}, "position_ids: got other numbers"),
        ({CACHE: None, "output_attentions": True}, "output_attentions: got True"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_custom_generate_refuses_what_it_does_not_do(options: dict[str, Any], message: str) -> None:
    model = llama()
    with calls_of(model) as calls, pytest.raises(ValueError, match=message):
        generate(model, **{"do_sample": False, **options})
    assert not calls


def test_custom_generate_refuses_a_cache_that_holds_tokens_and_other_inputs() -> None:
    model = llama()
    ids, mask = prompts()
    cache = tf.DynamicCache(config=model.config)
    model(input_ids=ids[:, :4], attention_mask=mask[:, :4], **{CACHE: cache})
    with pytest.raises(ValueError, match=f"{CACHE}: got a DynamicCache of 4 tokens"):
        generate(model, **{CACHE: cache})
    with pytest.raises(ValueError, match="inputs_embeds"):
        model.generate(inputs_embeds=torch.zeros(1, 3, 32), max_new_tokens=2, custom_generate=custom_generate)
