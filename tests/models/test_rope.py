"""LongRoPE and dynamic RoPE, whose frequencies change with the longest sequence of a forward pass: right on
one side, refused across."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from fastalign.data import Tokenized, check_packing, collate
from fastalign.rollout import Rollout, generate
from fastalign.rope import check_lengths, rope_switch

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SHAPE |= {
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "max_position_embeddings": 64,
}
SWITCH = 16


def phi3() -> Any:
    ropes = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 2.0, 8.0, 32.0],
    }
    return build(tf.Phi3Config(**SHAPE, original_max_position_embeddings=SWITCH, rope_parameters=ropes))


def llama(**changes: Any) -> Any:
    ropes = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    return build(
        tf.LlamaConfig(**{**SHAPE, "max_position_embeddings": SWITCH, "rope_parameters": ropes, **changes})
    )


def build(config: Any) -> Any:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
    return model


def prompts(*lengths: int) -> tuple[Tensor, Tensor]:
    width = max(lengths)
    ids = torch.randint(3, 97, (len(lengths), width), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return ids.masked_fill(mask == 0, 0), mask


def roll_out(model: Any, ids: Tensor, mask: Tensor, new: int) -> Rollout:
    return generate(model, ids, mask, max_new_tokens=new, seed=3, eos_id=None, pad_id=0)


@pytest.mark.parametrize(
    ("make", "lengths", "new"),
    [(phi3, (9, 4), 7), (phi3, (30, 17), 14), (llama, (9, 4), 7)],
    ids=["longrope below", "longrope above", "dynamic below"],
)
def test_a_rollout_on_one_side_of_the_switch_is_that_of_full_forwards(
    make: Any, lengths: tuple[int, ...], new: int
) -> None:
    model, (ids, mask) = make(), prompts(*lengths)
    seen = roll_out(model, ids, mask, new)
    for row, length in enumerate(lengths):
        whole = torch.cat((ids[row, -length:], seen.tokens[row]))
        for stop in range(
            length, length + new
        ):  # each token by a forward of its own over all before it, without a cache
            logp = model(input_ids=whole[None, :stop], use_cache=False).logits[0, -1].log_softmax(-1)
            torch.testing.assert_close(
                seen.logp_raw[row, stop - length], logp[whole[stop]], rtol=0, atol=1e-5
            )
        rescored = model(input_ids=whole[None], use_cache=False).logits[0, length - 1 : -1].log_softmax(-1)
        expected = rescored.gather(-1, seen.tokens[row][:, None])[:, 0]
        torch.testing.assert_close(seen.logp_raw[row], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("lengths", [(9, 4), (16, 16), (20, 4)])
def test_a_rollout_across_the_longrope_switch_is_refused_before_it_begins(lengths: tuple[int, ...]) -> None:
    model = phi3()
    model.register_forward_hook(lambda *_: pytest.fail("the model ran"))
    message = (
        r"max_new_tokens: got 14 after prompts of \d+ to \d+ tokens, .* "
        r"16 tokens \(original_max_position_embeddings of its longrope"
    )
    with pytest.raises(ValueError, match=message):
        roll_out(model, *prompts(*lengths), 14)


def test_a_rollout_across_the_dynamic_switch_is_refused_before_it_begins() -> None:
    with pytest.raises(ValueError, match=r"16 tokens \(max_position_embeddings of its dynamic RoPE\)"):
        roll_out(llama(), *prompts(9, 4), 8)


def test_a_packed_row_across_the_switch_is_off_and_refused_by_lengths() -> None:
    model = phi3()
    long, short = (
        Tokenized([(7 * place + first) % 97 for place in range(length)], [True] * length)
        for first, length in ((1, 20), (4, 8))
    )
    rows = ([long, short], [short])
    packed, alone = ({k: v for k, v in collate([row], pad_id=0).items() if k != "labels"} for row in rows)
    off = (
        (
            model(**packed, use_cache=False).logits[0, -8:].log_softmax(-1)
            - model(**alone, use_cache=False).logits[0].log_softmax(-1)
        )
        .abs()
        .max()
    )
    assert off > 0.5, "nats by which the company of a longer one moves a short sequence"
    check_packing(model, lengths=[8, 16])
    check_packing(model, lengths=[17, 40])
    with pytest.raises(
        ValueError,
        match=r"got sequences of 8 to 20 tokens for one .* 16 tokens .* longrope RoPE.*: turn packing off",
    ):
        check_packing(model, lengths=[20, 8])
    with pytest.raises(
        ValueError,
        match=(
            "lengths: got None, expected those of the sequences to pack, "
            "because Phi3ForCausalLM changes at 16"
        ),
    ):
        check_packing(model)
    check_packing(llama(), lengths=[8, 16])
    with pytest.raises(ValueError, match="dynamic"):
        check_packing(llama(), lengths=[17, 17])  # and it depends on what the model ran before


def test_the_switch_is_found_in_every_form_of_configuration() -> None:
    assert rope_switch(tf.LlamaConfig()) is None and rope_switch(tf.GPT2Config()) is None
    layers = {
        "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        "sliding_attention": {"rope_type": "default"},
    }
    text = {**SHAPE, "head_dim": 8, "rope_parameters": layers}
    for config in (tf.Gemma3TextConfig(**text), tf.Gemma3Config(text_config=text)):
        switch = rope_switch(config)
        assert switch is not None and (switch.kind, switch.tokens) == ("dynamic", 64)
    check_lengths(phi3().config, [], remedy="")
    check_lengths(tf.LlamaConfig(), [1, 10**6], remedy="")
