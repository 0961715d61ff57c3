"""Reward and value models of another tokenizer than the policy's."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from fastalign.data import load_rows, tokenize_prompts
from fastalign.stages import ppo
from fastalign.stages.policy.scorers import find_classifier, load_classifier
from fastalign.stages.ppo import PPOConfig
from fastalign.stages.runs.distributed import World
from tests.stages.tiny import save_tokenizer, sentence

ALONE = World(0, 1, torch.device("cpu"))
Make = Callable[..., PPOConfig]


def save_foreign(folder: Path, config: Any, **tokenizer: Any) -> str:
    """An untrained classifier with one label and a byte-level tokenizer of its own."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        map(sentence, range(9)), vocab_size=280, special_tokens=["<pad>", "<eos>", "<s>"], show_progress=False
    )
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config, dtype=torch.float64).save_pretrained(folder)
    return str(folder)


FOREIGN: dict[str, Any] = {
    "vocab_size": 280,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
FOREIGN |= {"num_labels": 1, "bos_token_id": None, "eos_token_id": None}


@pytest.mark.parametrize(
    ("config", "tokenizer", "message"),
    [
        (LlamaConfig(**FOREIGN, pad_token_id=None), {}, "got the pad token id None in its tokenizer"),
        (
            LlamaConfig(**FOREIGN, pad_token_id=2),
            {"pad_token": "<pad>"},
            "got the pad token id 0 in its tokenizer and 2 in its config",
        ),
        (
            BertConfig(**FOREIGN, pad_token_id=0, max_position_embeddings=40),
            {"pad_token": "<pad>"},
            r"got a prompt of \d+ .* of 12, expected at most 40",
        ),
        (
            RobertaConfig(**FOREIGN, pad_token_id=1, max_position_embeddings=42),
            {"pad_token": "<eos>"},
            "of 12, expected at most 40",
        ),
        (
            BertConfig(**FOREIGN, pad_token_id=0),
            {"pad_token": "<pad>", "model_max_length": 30},
            "of 12, expected at most 30",
        ),
    ],
    ids=["no pad", "two pads", "positions", "roberta's positions", "length"],
)
def test_a_foreign_classifier_that_cannot_score_is_refused_before_it_is_loaded(
    make: Make,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    config: Any,
    tokenizer: dict[str, Any],
    message: str,
) -> None:
    folder = save_foreign(tmp_path / "foreign", config, **tokenizer)
    configured = make(reward=folder)
    request.getfixturevalue("no_model")
    with pytest.raises(ValueError, match=f"reward: '{folder}': .*{message}"):
        ppo.run(configured)


def test_a_foreign_decoder_without_a_pad_token_in_its_config_scores_the_last_token(
    make: Make, files: dict[str, str], tmp_path: Path
) -> None:
    folder = save_foreign(tmp_path / "foreign", LlamaConfig(**FOREIGN, pad_token_id=None), pad_token="<pad>")
    classifier, tokenizer = find_classifier(folder, None), AutoTokenizer.from_pretrained(files["tokenizer"])
    prompts = tokenize_prompts(load_rows(files["prompts"]), tokenizer, max_length=64)[:3]
    texts = (" good", " a dull story", " bright and never bad")
    options: dict[str, Any] = {"dtype": torch.float64, "rows": 3, "attention": "sdpa", "packing": True}
    scores = load_classifier(classifier, ALONE, tokenizer, **options)(
        prompts, [tokenizer.encode(text) for text in texts]
    )
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()
    alone = [
        model(torch.tensor([classifier.tokenizer.encode(p.row["prompt"] + t)])).logits.item()
        for p, t in zip(prompts, texts, strict=True)
    ]
    assert scores.tolist() == pytest.approx(alone, rel=1e-6)


def test_a_foreign_decoder_whose_tokenizer_pads_on_the_left_scores_each_text_as_alone(
    files: dict[str, str], tmp_path: Path
) -> None:
    """GPT-2 counts its positions from the padding: a shorter text got another score beside a longer one."""
    sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 96, "vocab_size": 280}
    config = GPT2Config(**sizes, num_labels=1, pad_token_id=0, initializer_range=0.5)
    folder = save_foreign(tmp_path / "foreign", config, pad_token="<pad>", padding_side="left")
    tokenizer = AutoTokenizer.from_pretrained(files["tokenizer"])
    prompts = tokenize_prompts(load_rows(files["prompts"]), tokenizer, max_length=64)[:3]
    completions = [tokenizer.encode(text) for text in (" a", " good film" * 4, " b")]
    together, alone = (
        load_classifier(
            find_classifier(folder, None),
            ALONE,
            tokenizer,
            dtype=torch.float64,
            rows=rows,
            attention="sdpa",
            packing=True,
        )(prompts, completions)
        for rows in (3, 1)
    )
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)


def test_a_conversation_that_is_longer_than_a_foreign_classifier_reads_is_cut_with_a_warning(
    files: dict[str, str], tmp_path: Path
) -> None:
    folder = save_foreign(
        tmp_path / "foreign",
        BertConfig(**FOREIGN, pad_token_id=0, max_position_embeddings=40),
        pad_token="<pad>",
    )
    classifier, tokenizer = find_classifier(folder, None), AutoTokenizer.from_pretrained(files["tokenizer"])
    prompts = tokenize_prompts(load_rows(files["prompts"]), tokenizer, max_length=64)[:1]
    score = load_classifier(
        classifier, ALONE, tokenizer, dtype=torch.float64, rows=1, attention="sdpa", packing=True
    )
    with pytest.warns(
        UserWarning,
        match="reward: conversations of more than the 40 tokens that the classifier reads are cut",
    ):
        assert math.isfinite(
            score(prompts, [tokenizer.encode(" qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqq")]).item()
        )


def test_a_value_model_is_checked_before_anything_is_loaded(
    make: Make, files: dict[str, str], no_model: None, tmp_path: Path
) -> None:
    small = LlamaConfig(**FOREIGN | {"vocab_size": 300}, max_position_embeddings=20)
    small.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"got a sequence of \d+ tokens, expected at most the model's 20 \(max_position_embeddings\)",
    ):
        ppo.run(make(value_model=str(tmp_path)))


def test_a_value_model_of_other_tokens_is_refused(make: Make, no_model: None, tmp_path: Path) -> None:
    LlamaConfig(**FOREIGN | {"vocab_size": 300}).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, ("<s>", "<eos>", "<pad>"))
    with pytest.raises(ValueError, match="^value_model: got .* whose tokenizer has other tokens than the po"):
        ppo.run(make(value_model=str(tmp_path)))
