"""What PPO takes: rewards of all kinds, prompts and configurations; and what of these is refused."""

import json
import math
import sys
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
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from fastalign import cli
from fastalign.data import load_rows, tokenize_prompts
from fastalign.stages import batches, ppo, reward
from fastalign.stages.config import describe
from fastalign.stages.policy.scorers import find_classifier, load_classifier
from fastalign.stages.ppo import PPOConfig
from fastalign.stages.runs.distributed import World
from tests.stages.tiny import CHAT, lines, sentence, undescribed, write

ALONE = World(0, 1, torch.device("cpu"))
Make = Callable[..., PPOConfig]


# Rewards


def test_a_function_is_found_by_module_and_file_and_gets_the_columns_that_it_names(
    make: Make, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "functions", raising=False)  # of another test's file
    monkeypatch.syspath_prepend(str(Path(files["functions"]).parent))
    config = make(reward="functions:count")
    ppo.run(config)
    prompts, completions = sys.modules["functions"].seen[-1]
    rows = [json.loads(line) for line in Path(files["prompts"]).read_text().splitlines()]
    picked = [rows[n] for n in batches.rows_of_step(0, rows=24, batch_size=8, seed=0)]
    assert prompts == [row["prompt"] for row in picked] and not any("<eos>" in text for text in completions)
    scores = [text.count("a") - 0.05 * len(text) for text in completions]
    assert lines(config)[0]["objective/scores"] == pytest.approx(sum(scores) / 8)
    named = make(reward="functions:answered")
    counts = [text.count(row["answer"]) for text, row in zip(completions, picked, strict=True)]
    assert ppo.run(named)["objective/scores"] == pytest.approx(sum(counts) / 8), "the same tokens were drawn"


@pytest.mark.hosts
def test_our_reward_model_scores_the_tokens_as_transformers_does(
    base: str, files: dict[str, str], reward_model: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompts = tokenize_prompts(load_rows(files["prompts"]), tokenizer, max_length=64)[:5]
    completions = [[9, 10, 0], [11] * 7, [12, 13, 0], [3, 0], [40] * 12]
    classifier = find_classifier(reward_model, None)
    assert classifier.reads(tokenizer)
    scores = load_classifier(
        classifier, ALONE, tokenizer, dtype=torch.float64, rows=3, attention="sdpa", packing=True
    )(prompts, completions)
    model = AutoModelForSequenceClassification.from_pretrained(reward_model, dtype=torch.float64).eval()
    expected = [
        model(torch.tensor([prompt.input_ids + ids])).logits.item()
        for prompt, ids in zip(prompts, completions, strict=True)
    ]
    assert scores.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("chat", [False, True])
def test_another_classifier_reads_the_text_with_its_own_tokenizer(
    base: str, files: dict[str, str], tmp_path: Path, chat: bool
) -> None:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        map(sentence, range(9)), vocab_size=280, special_tokens=["<pad>", "<eos>", "<s>"], show_progress=False
    )
    reward_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, pad_token="<pad>", chat_template=CHAT
    )
    reward_tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    names = {0: "NEGATIVE", 1: "POSITIVE"}
    model = (
        BertForSequenceClassification(BertConfig(vocab_size=280, pad_token_id=0, id2label=names, **shape))
        .double()
        .eval()
    )
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompts = tokenize_prompts(load_rows(files["chats" if chat else "prompts"]), tokenizer, max_length=64)[:3]
    completions = [
        tokenizer.encode(text) + [0] for text in (" good", " a dull story", " bright and never bad")
    ]
    with pytest.raises(
        ValueError,
        match=r"reward_label: got None, expected the number of a label of .*: 0 \(NEGATIVE\), 1 \(POSITIVE\)",
    ):
        find_classifier(str(tmp_path), None)
    classifier = find_classifier(str(tmp_path), 1)
    assert not classifier.reads(tokenizer)
    score = load_classifier(
        classifier, ALONE, tokenizer, dtype=torch.float64, rows=2, attention="sdpa", packing=True
    )
    for place, (text, value) in enumerate(
        zip((" good", " a dull story", " bright and never bad"), score(prompts, completions), strict=True)
    ):
        whole = prompts[place].row["prompt"]
        whole = f"<s>user: {whole[0]['content']}<eos><s>assistant: {text}<eos>" if chat else whole + text
        assert value.item() == pytest.approx(
            model(torch.tensor([reward_tokenizer.encode(whole)])).logits[0, 1].item(), rel=1e-6
        )


def test_a_reward_model_of_adapters_scores(
    make: Make, files: dict[str, str], base: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "max_length": 96,
        "batch_size": 8,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lora_rank": 2,
        "dtype": "float64",
    }
    reward.run(
        reward.RewardConfig(
            model=base, train_data=files["pairs"], output_dir=str(tmp_path / "r"), device="cpu", **options
        )
    )
    config = make(reward=str(tmp_path / "r" / "model"))
    assert math.isfinite(ppo.run(config)["objective/scores"])


def test_scores_that_are_none_are_refused(make: Make, files: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"reward: got 1 scores from .*functions\.py:short, expected 8"):
        ppo.run(make(reward=files["functions"] + ":short"))
    with pytest.raises(ValueError, match=r"functions\.py:infinite for '.*', expected a finite number"):
        ppo.run(make(reward=files["functions"] + ":infinite"))


# Prompts


def test_prompts_lose_an_eos_and_long_ones_are_left_out_with_a_warning(
    files: dict[str, str], tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(files["tokenizer"])
    rows = load_rows(
        write(
            tmp_path / "p.jsonl",
            [{"prompt": "the film<eos>"}, {"prompt": sentence(1) * 3}, {"prompt": "a", "answer": "b"}],
        )
    )
    with pytest.warns(
        UserWarning, match=r"p\.jsonl, row 2: longer than max_prompt_length=8, left out \(1 of 3 rows\)"
    ):
        first, second = tokenize_prompts(rows, tokenizer, max_length=8)
    assert tokenizer.decode(first.input_ids) == "the film" and second.row == {"prompt": "a", "answer": "b"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}], r"p\.jsonl: columns: got text, expected 'prompt' too"),
        ([{"prompt": "a"}, {"prompt": 3}], r"p\.jsonl, row 2: column 'prompt': got int, expected text"),
        ([{"prompt": "a"}, {"prompt": ""}], r"p\.jsonl, row 2: column 'prompt': got an empty text"),
        ([{"prompt": "a " * 40}], r"p\.jsonl, row 1: longer than max_prompt_length=8, and so are all"),
        ([{"prompt": []}], r"p\.jsonl, row 1: column 'prompt': got no messages"),
    ],
)
def test_prompts_that_cannot_be_completed_are_refused(
    files: dict[str, str], tmp_path: Path, rows: list[Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tokenize_prompts(
            load_rows(write(tmp_path / "p.jsonl", rows)),
            AutoTokenizer.from_pretrained(files["tokenizer"]),
            max_length=8,
        )


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"importance_cap": 2.0}, r"importance_cap: got 2.0 with rescore=false"),
        ({"target_kl": 6.0, "kl_coef": 0}, r"target_kl: got 6.0 with kl_coef=0, expected a kl_coef above 0"),
        ({"tail_eps": 0.01, "top_p": 0.9}, "tail_eps: got 0.01 with top_k, top_p or min_p, expected null or"),
        ({"screen": True, "top_p": 0.9}, "screen: got true with top_k, top_p or min_p, expected false or"),
        ({"minibatches": 3}, r"batch_size: got 8, expected a multiple of minibatches \(3\)"),
        (
            {"reference": "adapters_off"},
            r"reference: got adapters_off without adapters \(lora_rank=0\), expected auto, copy or none",
        ),
        ({"reference": "none"}, "reference: got none with kl_coef=0.05, expected kl_coef=0"),
        (
            {"value": "shared", "value_model": "x"},
            r"value_model: got 'x' with value=shared, expected value=own",
        ),
        ({"reward_label": 1}, r"reward_label: got 1, expected none, because reward is the function"),
        ({"attention": "flash_attention_2"}, "attention: got flash_attention_2, expected auto, sdpa or"),
        ({"lora_rank": 2, "lora_dropout": 0.1}, "lora_dropout: got 0.1, expected 0"),
        ({"temperature": 0}, "temperature"),
        ({"dual_clip": 1.0}, "dual_clip"),
        ({"kl_estimator": "k4"}, "kl_estimator"),
        ({"beta": 0.1}, "got the unknown key 'beta'"),
    ],
)
def test_a_wrong_configuration_is_refused_by_name(make: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_what_cannot_be_used_is_refused_before_a_model_loads(
    make: Make, files: dict[str, str], base: str, reward_model: str, no_model: None
) -> None:
    for changes, message in (
        (
            {"train_data": files["answered"]},
            r"answered\.jsonl, row 2: column 'prompt': got an assistant turn at the end",
        ),
        (
            {"max_new_tokens": 90},
            "max_new_tokens: got a sequence of .* tokens, expected at most the model's 96",
        ),
        ({"reward": base}, r"reward: got .*, which holds GPT2LMHeadModel, expected a sequence classifier"),
        (
            {"reward": reward_model, "reward_label": 1},
            r"reward_label: got 1, expected the number of a label of .*: 0 \(LABEL_0\)",
        ),
        (
            {"reward": files["functions"] + ":cuont"},
            r"reward: got 'cuont', expected a function of .*functions\.py: count, answered, of_the_prompt",
        ),
        (
            {"reward": "no_such_module:score"},
            r"reward: got 'no_such_module:score' \(No module named 'no_such_module'\)",
        ),
        ({"reward": "no/such.py:score"}, "reward: got 'no/such.py:score' .*No such file"),
        (
            {"minibatches": 2, "micro_batch_size": 8},
            r"batch_size / minibatches: got 8 / 2, expected a multiple of micro_batch_size x devices",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            ppo.run(make(**changes))


def test_every_field_is_described_and_the_command_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert not undescribed(PPOConfig)
    with pytest.raises(SystemExit):
        cli.main(["ppo", "--help"])
    shown = capsys.readouterr().out
    assert (
        shown.startswith("usage: fastalign ppo")
        and describe(PPOConfig) in shown
        and "learning_rate: float (> 0) = 3.0e-06" in shown
    )
