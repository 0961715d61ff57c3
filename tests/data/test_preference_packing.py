"""Packed preferences give the log-probabilities and scores of each sequence alone."""

from functools import partial
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
)

from fastalign.causal_lm import fuse_head
from fastalign.classifier import score_packed
from fastalign.data import (
    Pair,
    Tokenized,
    Unpaired,
    last_tokens,
    pack_sequences,
    preference_pairs,
    sequence_logps,
)
from fastalign.probe import UnsupportedModelError
from tests.data.preferences import random_sequences

SMALL = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}


# Packing


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_packed_log_probabilities_are_those_of_each_sequence_alone(attention: str, family: str) -> None:
    torch.manual_seed(0)
    if family == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**SMALL))
    else:  # a window of 8 reaches over the sequences' borders, if anything does
        model = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=8))
    model.set_attn_implementation(attention)
    model.double().eval()
    lengths = [5, 19, 2, 11, 19, 7, 3]
    sequences = random_sequences(lengths)
    alone = []
    with torch.no_grad():
        for ids, trained in sequences:
            logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            alone.append(sum(logp[place - 1, ids[place]] for place in range(1, len(ids)) if trained[place]))
        fuse_head(model)
        packed = pack_sequences(sequences, pad_id=0, attention=attention)
        assert packed["arguments"]["input_ids"].shape[0] < len(sequences), "some must share a row"
        assert packed["lengths"].tolist() == [sum(sequence.trained) for sequence in sequences]
        for batch in (packed, pack_sequences(sequences, pad_id=0, attention=attention, packing=False)):
            torch.testing.assert_close(sequence_logps(model, batch), torch.stack(alone), rtol=1e-6, atol=1e-6)


def test_for_flash_attention_all_sequences_lie_in_one_row() -> None:
    sequences = random_sequences([5, 19, 2])
    packed = pack_sequences(sequences, pad_id=0, attention="flash_attention_2")
    assert packed["arguments"]["input_ids"].shape == (1, 26)
    assert packed["arguments"]["cu_seq_lens_q"].tolist() == packed["starts"][:4].tolist() == [0, 5, 24, 26]
    assert packed["places"].tolist() == [0, 1, 2]


def test_collators_keep_chosen_and_rejected_apart_and_in_order() -> None:
    one, two, three, four = random_sequences([5, 9, 7, 4])
    packer = partial(pack_sequences, pad_id=0)
    batch = preference_pairs.collate_pairs([Pair(one, two, 1.5), Pair(three, four, 0.0)], packer=packer)
    assert batch["both"]["sequences"] == (one, three, two, four) and batch["margins"].tolist() == [1.5, 0.0]
    assert "margins" not in preference_pairs.collate_pairs([Pair(one, two)], packer=packer)
    judged = preference_pairs.collate_unpaired(
        [Unpaired(one, True, two), Unpaired(three, False, four)], packer=packer
    )
    assert judged["answered"]["sequences"] == (one, three) and judged["mismatched"]["sequences"] == (
        two,
        four,
    )
    assert judged["both"]["sequences"] == (one, three, two, four) and judged["desirable"].tolist() == [
        True,
        False,
    ]
    assert "mismatched" not in preference_pairs.collate_unpaired([Unpaired(one, True)], packer=packer)


# Classifiers


@pytest.mark.parametrize("padding", [None, 0, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_scores_are_transformers_own(family: str, padding: int | None) -> None:
    torch.manual_seed(0)
    if family == "llama":
        model: Any = LlamaForSequenceClassification(LlamaConfig(**SMALL, num_labels=1, pad_token_id=padding))
    else:
        model = GPT2ForSequenceClassification(
            GPT2Config(
                vocab_size=320,
                n_embd=32,
                n_layer=2,
                n_head=2,
                num_labels=1,
                pad_token_id=padding,
                n_positions=32,
            )
        )
    model.double().eval()
    sequences = random_sequences([5, 19, 2, 11, 7])
    sequences = [
        Tokenized([*ids, 3], [*trained, True]) for ids, trained in sequences
    ]  # 3 ends them, and may be the padding too
    with torch.no_grad():
        separate = torch.stack([model(torch.tensor([ids])).logits[0] for ids, _ in sequences])
        if padding is not None:
            width = max(len(ids) for ids, _ in sequences)
            rows = torch.tensor([ids + [padding] * (width - len(ids)) for ids, _ in sequences])
            together = model(rows, attention_mask=(rows != padding).long()).logits
            torch.testing.assert_close(together, separate, rtol=1e-6, atol=1e-6)
        assert score_packed(model) is model
        packed = pack_sequences(sequences, pad_id=0)
        assert packed["arguments"]["input_ids"].shape[0] < len(sequences)
        ends = last_tokens(packed, pad_id=-1 if padding is None else padding)
        ours = model(**packed["arguments"], ends=ends, use_cache=False).logits
        torch.testing.assert_close(ours, separate, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            model(torch.tensor([sequences[1].input_ids])).logits[0], separate[1]
        )  # without ends: as ever


def test_a_classifier_that_pools_otherwise_is_refused() -> None:
    bert = BertForSequenceClassification(
        BertConfig(
            vocab_size=64,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            num_labels=1,
        )
    )
    with pytest.raises(
        UnsupportedModelError, match="got BertForSequenceClassification, which has no linear layer `score`"
    ):
        score_packed(bert)

    class MeanPooling(LlamaForSequenceClassification):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            return type(output)(logits=output.logits + 1)

    model = MeanPooling(LlamaConfig(**SMALL, num_labels=1))
    with pytest.raises(
        UnsupportedModelError,
        match="MeanPooling, which scores a sequence as .* expected the output of its layer `score`",
    ):
        score_packed(model)
    assert "forward" not in model.__dict__
