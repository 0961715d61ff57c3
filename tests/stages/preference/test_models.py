"""What the reward model, DPO and KTO learn, and that the saved models load."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2ForSequenceClassification,
)

from fastalign.data import load_rows, tokenize_pairs
from fastalign_kernels.preference.formulas import DPO_LOSS_TYPES
from tests.stages.preference.runs import STAGES, Make, plain_logps, run
from tests.stages.tiny import (
    lines,
    weights,
)

# What is trained and saved


def test_eos_that_pads_is_told_because_no_score_reads_it(
    make: Make, files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(make("reward", dry_run=True))
    assert "EOS as the padding token" not in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(files["tokenizer"])
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    model = tmp_path / "model"
    shutil.copytree(make("reward").model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    run(make("reward", dry_run=True, tokenizer=str(tmp_path), model=str(model)))
    assert "warning: tokenizer: got EOS as the padding token" in capsys.readouterr().out


@pytest.mark.hosts
@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_policies_learn_their_rows_and_load_as_causal_lms(
    make: Make, files: dict[str, str], stage: str
) -> None:
    config = make(
        stage, max_steps=25, eval_data=files[STAGES[stage][2]], beta=0.3, learning_rate=2e-3, dtype="float32"
    )
    result = run(config)
    assert result["eval/loss"] < 0.6 * lines(config)[0]["eval/loss"] and result["eval/rewards/margins"] > 1
    name = "pairs" if stage == "dpo" else "rows"
    assert result[name] == 25 * 8 and f"{name}_per_second" in result and "tokens" not in result
    folder = Path(config.output_dir, "model")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if stage == "dpo":
        pairs = tokenize_pairs(load_rows(config.train_data), tokenizer, max_length=64)
        with torch.no_grad():
            logps = plain_logps(model, [pair.chosen for pair in pairs]).mean().item()
        assert logps == pytest.approx(result["eval/logps/chosen"], rel=1e-5)


@pytest.mark.hosts
def test_a_reward_model_learns_its_pairs_and_scores_a_padded_batch_as_transformers_does(
    make: Make, files: dict[str, str]
) -> None:
    config = make("reward", max_steps=25, eval_data=files["pairs"], learning_rate=1e-3, dtype="float32")
    result = run(config)
    assert result["eval/accuracy"] == 1.0 and result["eval/loss"] < 0.2
    folder = Path(config.output_dir, "model")
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert isinstance(model, GPT2ForSequenceClassification) and model.config.num_labels == 1
    assert model.config.pad_token_id == tokenizer.pad_token_id
    rows = [json.loads(line) for line in Path(files["pairs"]).read_text().splitlines()]
    means = []
    for side in ("chosen", "rejected"):
        batch = tokenizer(
            [row["prompt"] + row[side] + tokenizer.eos_token for row in rows],
            padding=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            means.append(
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
                .logits.mean()
                .item()
            )
    assert means[0] - means[1] == pytest.approx(result["eval/margin"], rel=1e-4)


@pytest.mark.hosts
@pytest.mark.parametrize("stage", STAGES)
def test_lora_trains_the_adapters_and_they_load_on_the_base(make: Make, base: str, stage: str) -> None:
    config = make(stage, lora_rank=4, max_steps=12, learning_rate=1e-2, dtype="float32")
    run(config)
    losses = [line["loss"] for line in lines(config)]
    assert losses[-1] < losses[0]
    folder = Path(config.output_dir, "model")
    adapters = weights(config)
    assert all("lora_" in name or (stage == "reward" and "score" in name) for name in adapters)
    assert not (folder / "model.safetensors").exists()
    options = {"num_labels": 1} if stage == "reward" else {}
    auto = AutoPeftModelForSequenceClassification if stage == "reward" else AutoPeftModelForCausalLM
    loaded = auto.from_pretrained(folder, **options).eval()
    assert any(weight.abs().max() > 0 for name, weight in loaded.named_parameters() if "lora_B" in name)


def test_centring_draws_the_scores_to_zero(make: Make) -> None:
    plain, centred = (
        make("reward", max_steps=10, center_coefficient=weight, learning_rate=1e-3) for weight in (0.0, 1.0)
    )
    assert abs(run(centred)["mean_reward"]) < abs(run(plain)["mean_reward"])


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("options", [{"bf16": True}, {"gradient_checkpointing": True}])
def test_the_ways_to_save_memory_train(make: Make, stage: str, options: dict[str, Any]) -> None:
    plain, changed = (
        make(stage, max_steps=2, dtype="float32", lora_rank=2, **more) for more in ({}, options)
    )
    run(plain)
    run(changed)
    tolerance = 0.05 if "bf16" in options else 1e-6
    for one, other in zip(lines(plain), lines(changed), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=tolerance)


@pytest.mark.parametrize("loss_type", DPO_LOSS_TYPES)
def test_every_loss_of_pairs_trains(make: Make, loss_type: str) -> None:
    smoothing = 0.1 if loss_type == "exo_pair" else 0.0
    config = make("dpo", max_steps=2, loss_type=loss_type, label_smoothing=smoothing, learning_rate=1e-4)
    run(config)
    assert all(line["grad_norm"] > 0 for line in lines(config))
