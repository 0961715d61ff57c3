"""A prompt that two sequences share is computed once, and nothing else changes: who sees what,
log-probabilities, gradients, scores."""

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    FalconConfig,
    FalconModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fastalign.causal_lm import fuse_head
from fastalign.classifier import score_packed
from fastalign.data import (
    Pair,
    Tokenized,
    Unpaired,
    collate_pairs,
    collate_unpaired,
    last_tokens,
    mismatch,
    pack_sequences,
    sequence_logps,
)
from fastalign.data.packing import FLASH
from fastalign.data.shared_prefix import Family, explain_unshared, find_families, model_arguments

V = 97
SMALL: dict[str, Any] = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
GPT2 = {
    "vocab_size": V,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 40,
    "resid_pdrop": 0,
    "embd_pdrop": 0,
    "attn_pdrop": 0,
}
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "gpt2, positions from a table": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL)),
    "gemma3, a window wide": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SMALL, sliding_window=80, layer_types=["sliding_attention", "full_attention"])
    ),
    "mistral, its window wide": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=80)),
}
SHARING = partial(pack_sequences, pad_id=0, hidden_size=32)


def sequence(prompt: Sequence[int], completion: Sequence[int]) -> Tokenized:
    return Tokenized([*prompt, *completion], [False] * len(prompt) + [True] * len(completion))


def ended(one: Tokenized) -> Tokenized:
    return Tokenized([*one.input_ids, 3], [*one.trained, True])


def draw(generator: random.Random, length: int) -> list[int]:
    return [generator.randrange(1, V) for _ in range(length)]


def ragged_pairs(seed: int = 0) -> list[Pair]:
    """Prompts of 1 to 30 tokens; completions that begin alike, one cut after a token, one that a token joins
    to its prompt."""
    generator = random.Random(seed)
    pairs = []
    for length, chosen, rejected in ((12, 5, 9), (30, 3, 8), (1, 6, 4), (2, 7, 2), (25, 1, 1), (9, 9, 3)):
        prompt = draw(generator, length)
        pairs.append(
            Pair(sequence(prompt, draw(generator, chosen)), sequence(prompt, draw(generator, rejected)))
        )
    prompt, alike = draw(generator, 14), draw(generator, 4)
    pairs.append(Pair(sequence(prompt, alike + [1, 2]), sequence(prompt, [*alike, 3])))
    pairs.append(Pair(sequence(prompt, alike), sequence(prompt, alike[:1])))  # max_length has cut it
    pairs.append(Pair(sequence(prompt, alike), sequence(prompt[:-1], [5, 6])))
    return pairs


def build(name: str, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    model = MODELS[name]()
    model.set_attn_implementation(attention)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.double().train()


def logp_alone(model: Any, one: Tokenized) -> Tensor:
    logp = model(torch.tensor([one.input_ids])).logits[0].log_softmax(-1)
    places = [place for place, trained in enumerate(one.trained) if trained]
    return logp[[place - 1 for place in places], [one.input_ids[place] for place in places]].sum()


def gradients(loss: Tensor, model: Any) -> dict[str, Tensor]:
    names, weights = zip(*((name, weight) for name, weight in model.named_parameters()))
    return dict(zip(names, torch.autograd.grad(loss, weights)))


# What is computed


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_and_gradients_are_those_of_separate_sequences(name: str, attention: str) -> None:
    model = build(name, attention)
    both = collate_pairs(ragged_pairs(), packer=partial(SHARING, attention=attention))["both"]
    assert "prefixes" in both
    upstream = torch.randn(len(both["sequences"]), dtype=torch.float64)
    alone = torch.stack([logp_alone(model, one) for one in both["sequences"]])
    expected = gradients(alone @ upstream, model)
    fuse_head(model)
    logps = sequence_logps(model, both)
    rounding = (
        1e-14 if name.startswith("gpt2") else 1e-7
    )  # the others' norms are in fp32, whatever the model is
    torch.testing.assert_close(logps, alone, rtol=10 * rounding, atol=10 * rounding)
    found = gradients(logps @ upstream, model)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for weight, gradient in expected.items():
        assert (found[weight] - gradient).abs().max() <= 10 * rounding * largest, weight


def test_mismatched_completions_share_the_prompt_of_their_row() -> None:
    model = fuse_head(build("llama"))
    answered = [Unpaired(pair.chosen, number % 2 == 0) for number, pair in enumerate(ragged_pairs())]
    rows = mismatch(answered, seed=0, step=0, max_length=40)
    rows[2] = rows[2]._replace(mismatched=None)
    rows[4] = rows[4]._replace(mismatched=None)
    batch, apart = (
        collate_unpaired(rows, packer=packer) for packer in (SHARING, partial(pack_sequences, pad_id=0))
    )
    alone = [len(rows[number].answered.input_ids) for number in (2, 4)]
    lengths = [
        1 + sum(one.trained) for one in batch["both"]["sequences"]
    ]  # the prompt's last token and the completion
    branches = batch["both"]["starts"].diff()[batch["both"]["places"]].tolist()
    assert branches == [*lengths[:2], alone[0], lengths[3], alone[1], *lengths[5:]]
    assert batch["both"]["arguments"]["input_ids"].numel() < apart["both"]["arguments"]["input_ids"].numel()
    assert not {"prefixes"} & (batch["answered"].keys() | batch["mismatched"].keys())
    assert torch.equal(batch["both"]["lengths"], apart["both"]["lengths"])
    torch.testing.assert_close(
        sequence_logps(model, batch["both"]), sequence_logps(model, apart["both"]), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_scores_are_those_of_separate_sequences(kind: str, padding: int) -> None:
    """With padding 3, which also ends some, and a completion and the end of its prompt that are nothing
    else."""
    torch.manual_seed(0)
    if kind == "llama":
        model: Any = LlamaForSequenceClassification(LlamaConfig(**SMALL, num_labels=1, pad_token_id=padding))
    else:
        model = GPT2ForSequenceClassification(GPT2Config(**GPT2, num_labels=1, pad_token_id=padding))
    score_packed(model.double().eval())
    prompt = draw(random.Random(1), 11)
    pairs = [Pair(ended(pair.chosen), ended(pair.rejected)) for pair in ragged_pairs()[:5]]
    pairs.append(Pair(sequence([*prompt, 3, 3], [3, 3]), sequence([*prompt, 3, 3], [7, 3])))
    pairs.append(Pair(sequence([3, 3, 3], [3]), sequence([3, 3, 3], [5])))
    packed = collate_pairs(pairs, packer=partial(SHARING, pad_id=padding))["both"]
    assert "prefixes" in packed
    scores = model(
        **model_arguments(packed), ends=last_tokens(packed, pad_id=padding), use_cache=False
    ).logits
    for one, score in zip(packed["sequences"], scores):
        place = max((place for place, token in enumerate(one.input_ids) if token != padding), default=0)
        alone = model(torch.tensor([one.input_ids]), ends=torch.tensor([place]), use_cache=False).logits[0]
        torch.testing.assert_close(score, alone, rtol=1e-10, atol=1e-10)


# The layout


def test_the_prompt_but_its_last_token_is_there_once() -> None:
    generator = random.Random(2)
    prompt, chosen, rejected = draw(generator, 20), draw(generator, 4), draw(generator, 6)
    pair = Pair(sequence(prompt, chosen), sequence(prompt, rejected))
    packed = collate_pairs([pair], packer=SHARING)["both"]
    assert packed["arguments"]["input_ids"].tolist() == [prompt + chosen + prompt[-1:] + rejected]
    assert packed["arguments"]["position_ids"].tolist() == [[*range(24), *range(19, 26)]]
    assert packed["arguments"]["labels"].tolist() == [[-100] * 20 + chosen + [-100] + rejected]
    assert packed["starts"].tolist() == [0, 19, 24, 31, 31] and packed["places"].tolist() == [1, 2]
    assert packed["prefixes"].tolist() == [0, 0, 0, 3] and packed["lengths"].tolist() == [4, 6]
    assert packed["sequences"] == (pair.chosen, pair.rejected)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_a_token_sees_its_own_sequence_and_nothing_else(seed: int, additive: bool) -> None:
    packed = collate_pairs(
        ragged_pairs(seed), packer=partial(SHARING, attention="eager" if additive else "sdpa")
    )["both"]
    arguments = model_arguments(packed)
    mask = arguments["attention_mask"][:, 0]
    rows, width = arguments["input_ids"].shape
    assert mask.shape == (rows, width, width) and mask.dtype == (torch.float32 if additive else torch.bool)
    seen = mask == 0 if additive else mask
    assert seen.diagonal(dim1=1, dim2=2).all(), "a row of scores without a finite one would be NaN"
    for number, (ids, trained) in enumerate(packed["sequences"]):
        start, end = packed["starts"][packed["places"][number] :][:2].tolist()
        assert end - start > sum(trained), "what predicts a scored token is in the branch"
        for place in range(start, end):
            row, column = divmod(place, width)
            tokens = arguments["input_ids"][row][seen[row, column]].tolist()
            positions = arguments["position_ids"][row][seen[row, column]].tolist()
            assert tokens == ids[: len(ids) - (end - place) + 1] and positions == [*range(len(tokens))]


def test_what_two_sequences_share_ends_before_what_is_read_of_either() -> None:
    def shared(one: Tokenized, other: Tokenized, pad_id: int = 0) -> int:
        (family, *rest) = find_families([one, other], [5, 5], pad_id=pad_id)
        assert not rest or (family.shared, len(rest)) == (0, 1)
        return family.shared

    prompt = [1, 2, 3, 4]
    assert shared(sequence(prompt, [5, 6]), sequence(prompt, [5, 7])) == 3  # not the 5 of both
    assert shared(sequence(prompt, [5]), sequence(prompt[:-1], [4, 5])) == 2  # trained a token earlier
    assert shared(sequence(prompt, [5]), sequence([1, 2, 9, 4], [5])) == 2
    assert shared(sequence([1], [5]), sequence([1], [6])) == 0
    assert shared(sequence(prompt, [5]), sequence([9, 2, 3, 4], [5])) == 0
    assert shared(sequence(prompt, [4]), sequence(prompt, [5]), pad_id=4) == 2  # a classifier reads the 3
    untrained = Tokenized(prompt, [False] * 4)
    assert shared(untrained, untrained) == 3
    assert find_families([untrained, untrained], [0, 1], pad_id=0) == [Family((0,), 0, 4), Family((1,), 0, 4)]


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    tensors = {
        name: (value, other[name]) for name, value in one.items() if name not in ("arguments", "sequences")
    }
    tensors |= {
        name: (value, other["arguments"][name])
        for name, value in one["arguments"].items()
        if torch.is_tensor(value)
    }
    return one.keys() == other.keys() and all(torch.equal(*two) for two in tensors.values())


def test_nothing_is_shared_where_that_costs_more() -> None:
    """A prompt of 9 tokens before 60 saves 8 of 138 tokens, and the mask lets 130 tokens meet where a causal
    one let 69."""
    generator = random.Random(3)
    prompt = draw(generator, 9)
    pair = Pair(sequence(prompt, draw(generator, 60)), sequence(prompt, draw(generator, 60)))
    apart = collate_pairs([pair], packer=partial(pack_sequences, pad_id=0))["both"]
    assert same(collate_pairs([pair], packer=SHARING)["both"], apart)
    wide = collate_pairs([pair], packer=partial(SHARING, hidden_size=1024))["both"]
    assert wide["arguments"]["input_ids"].shape == (1, 130)


def test_nothing_changes_without_pairs_and_without_a_hidden_size() -> None:
    sequences = [pair.chosen for pair in ragged_pairs()]
    assert same(SHARING(sequences), pack_sequences(sequences, pad_id=0))
    both = [*sequences, *sequences]
    flash = pack_sequences(both, [*range(len(sequences))] * 2, pad_id=0, attention=FLASH)
    assert same(flash, pack_sequences(both, pad_id=0, attention=FLASH)) and "prefixes" not in flash


# Which models


def explain(model: Any, longest: int = 20, attention: str = "sdpa") -> str | None:
    return explain_unshared(
        model, partial(pack_sequences, pad_id=0, attention=attention), attention=attention, longest=longest
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_models_of_full_attention_can_share(name: str, attention: str) -> None:
    model = build(name, attention)
    assert explain(model.base_model, 40, attention) is None
    assert explain(model.float().base_model, 3, attention) is None
    assert explain(model.bfloat16().base_model, 40, attention) is None
    assert model.training


def test_windows_that_a_pair_would_reach_over_are_named() -> None:
    for name, kind in (("mistral, its window wide", "Mistral"), ("gemma3, a window wide", "Gemma3Text")):
        assert (
            explain(build(name).base_model, 41)
            == f"{kind}Model has a sliding_window of 80 tokens, and pairs have up to 82"
        )
    full = build("qwen3")
    full.config.sliding_window = 8  # no layer heeds it
    assert full.config.layer_types == ["full_attention"] * 2 and explain(full.base_model) is None
    local = GPTNeoModel(
        GPTNeoConfig(
            **SMALL, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], window_size=8
        )
    )
    assert (
        explain(local, attention="eager")
        == "GPTNeoModel has a window_size of 8 tokens, and pairs have up to 40"
    )


def test_other_kinds_of_layers_and_flash_attention_are_named() -> None:
    model = build("qwen3")
    assert explain(model.base_model, attention=FLASH) == "flash_attention_2 takes no mask"
    model.config.layer_types = ["linear_attention", "full_attention"]
    assert explain(model.base_model) == "Qwen3Model has layers of the kind linear_attention"


def test_a_window_that_the_config_does_not_name_shows() -> None:
    local = GPTNeoModel(
        GPTNeoConfig(
            **SMALL, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], window_size=30
        )
    )
    for parameter in local.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    local.config.window_size = 256  # the layers have their own copy of it by now
    assert explain(local, 12, "eager") is None
    assert "the hidden states of GPTNeoModel would be" in str(
        explain(local, 20, "eager")
    )  # a pair is up to 36 tokens long


def test_models_that_take_no_mask_or_do_not_heed_it_show() -> None:
    class Unmasked(LlamaModel):
        def forward(self, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    torch.manual_seed(0)
    assert "the hidden states of Unmasked would be" in str(explain(Unmasked(LlamaConfig(**SMALL))))
    alibi = FalconModel(
        FalconConfig(vocab_size=V, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, alibi=True)
    )
    assert "FalconModel does not take a mask: " in str(explain(alibi))
