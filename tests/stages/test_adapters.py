"""Folders of adapters, taken wherever a model is, from any working directory, and merged into plain
models."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fastalign.stages import dpo, kto, merge, ppo, pretrain, reward, sft
from fastalign.stages.models.adapters import find_source, load_architecture, load_plain
from fastalign.stages.models.loading import load_tokenizer
from tests.stages.tiny import CHAT, lines, save_base, save_tokenizer, sentence, write

OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float64",
    "batch_size": 4,
    "max_steps": 2,
    "learning_rate": 1e-2,
}
SEQUENCES: dict[str, Any] = {"max_length": 96}
RANK: dict[str, Any] = {"lora_rank": 4}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base/model, data, and sft/model and reward/model: adapters on the base, and on those of
    SFT."""
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = save_tokenizer(folder / "tokenizer", ("<eos>", "<pad>", "<s>"), chat_template=CHAT)
    save_base(
        folder / "base" / "model", tokenizer, length=96, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0
    )
    write(
        folder / "demonstrations.jsonl",
        [{"prompt": sentence(n), "completion": " " + sentence(n + 50)} for n in range(8)],
    )
    write(
        folder / "pairs.jsonl",
        [{"prompt": sentence(n), "chosen": " good", "rejected": " bad " + sentence(n + 9)} for n in range(8)],
    )
    write(
        folder / "judged.jsonl",
        [{"prompt": sentence(n), "completion": " " + sentence(n + 9), "label": n % 2 == 0} for n in range(8)],
    )
    write(folder / "prompts.jsonl", [{"prompt": sentence(n)} for n in range(8)])
    common = OPTIONS | SEQUENCES | RANK
    base, tuned = str(folder / "base" / "model"), str(folder / "sft" / "model")
    sft.run(
        sft.SFTConfig(
            model=base, train_data=f"{folder}/demonstrations.jsonl", output_dir=f"{folder}/sft", **common
        )
    )
    reward.run(
        reward.RewardConfig(
            model=tuned, train_data=f"{folder}/pairs.jsonl", output_dir=f"{folder}/reward", **common
        )
    )
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.tensor([[5, 9, 30, 7]])).logits
    return found


def aligned(runs: Path, stage: str, model: str, out: Path, **changes: Any) -> Any:
    """The configuration of a preference or PPO run that has already ended."""
    module, name, data = {
        "dpo": (dpo, "DPOConfig", "pairs"),
        "kto": (kto, "KTOConfig", "judged"),
        "reward": (reward, "RewardConfig", "pairs"),
        "ppo": (ppo, "PPOConfig", "prompts"),
    }[stage]
    options = OPTIONS | (
        {"reward": str(runs / "reward" / "model"), "max_new_tokens": 4, "ppo_epochs": 1}
        if stage == "ppo"
        else SEQUENCES
    )
    config = getattr(module, name)(
        model=model, train_data=str(runs / f"{data}.jsonl"), output_dir=str(out), **(options | changes)
    )
    getattr(module, "run")(config)  # noqa: B009
    return config


@pytest.mark.parametrize("stage", ["reward", "dpo", "kto", "ppo"])
def test_a_stage_on_adapters_takes_the_steps_that_it_takes_on_the_merged_model(
    runs: Path, tmp_path: Path, stage: str
) -> None:
    merged = merge.run(
        merge.MergeConfig(model=str(runs / "sft" / "model"), output_dir=str(tmp_path / "merged"))
    )
    of_adapters, of_merged = (
        aligned(runs, stage, model, tmp_path / name, lora_rank=4)
        for name, model in {"a": str(runs / "sft" / "model"), "b": str(merged)}.items()
    )
    for one, other in zip(lines(of_adapters), lines(of_merged), strict=True):
        assert one == pytest.approx(other, rel=1e-9, abs=1e-12)
    if stage in ("dpo", "kto"):  # the reference is the merged model: nothing has moved yet
        assert lines(of_adapters)[0]["loss"] == pytest.approx(0.6931471805599453 if stage == "dpo" else 0.5)
    assert find_source(f"{tmp_path}/a/model").adapters == [
        str((runs / "sft" / "model").resolve()),
        f"{tmp_path}/a/model",
    ]


def test_all_weights_are_trained_on_adapters_without_new_ones(runs: Path, tmp_path: Path) -> None:
    config = aligned(runs, "dpo", str(runs / "sft" / "model"), tmp_path / "whole")
    assert Path(config.output_dir, "model", "model.safetensors").is_file()
    assert lines(config)[0]["loss"] == pytest.approx(0.6931471805599453)


def test_merged_weights_compute_what_base_and_adapters_do(runs: Path, tmp_path: Path) -> None:
    adapters = str(runs / "sft" / "model")
    merged = merge.run(merge.MergeConfig(model=adapters, output_dir=str(tmp_path / "merged")))
    expected = logits(AutoPeftModelForCausalLM.from_pretrained(adapters, dtype=torch.float64))
    base = logits(AutoModelForCausalLM.from_pretrained(runs / "base" / "model", dtype=torch.float64))
    found = AutoModelForCausalLM.from_pretrained(merged, dtype="auto")
    torch.testing.assert_close(logits(found), expected, rtol=1e-12, atol=1e-12)
    assert (expected - base).abs().max() > 1e-3 and found.dtype == torch.float64
    assert {"generation_config.json", "tokenizer.json", "chat_template.jinja"} <= {
        path.name for path in merged.iterdir()
    }
    assert (
        AutoTokenizer.from_pretrained(merged).get_vocab()
        == AutoTokenizer.from_pretrained(adapters).get_vocab()
    )


def test_a_reward_model_of_adapters_on_adapters_is_merged_whole(runs: Path, tmp_path: Path) -> None:
    merged = merge.run(
        merge.MergeConfig(
            model=str(runs / "reward" / "model"), output_dir=str(tmp_path / "merged"), dtype="float64"
        )
    )
    found = AutoModelForSequenceClassification.from_pretrained(merged, dtype=torch.float64)
    loaded = load_plain(str(runs / "reward" / "model"), task="SEQ_CLS", dtype=torch.float64, num_labels=1)
    loaded.config.pad_token_id = found.config.pad_token_id
    torch.testing.assert_close(logits(found), logits(loaded))
    assert found.config.num_labels == 1 and found.config.pad_token_id is not None
    assert all(weight.requires_grad for weight in loaded.parameters())


def test_adapters_are_a_value_model_too(runs: Path, tmp_path: Path) -> None:
    config = aligned(
        runs,
        "ppo",
        str(runs / "sft" / "model"),
        tmp_path / "ppo",
        value_model=str(runs / "reward" / "model"),
        lora_rank=4,
    )
    value = load_plain(f"{config.output_dir}/value", task="SEQ_CLS", dtype=torch.float64, num_labels=1)
    before = load_plain(str(runs / "reward" / "model"), task="SEQ_CLS", dtype=torch.float64, num_labels=1)
    assert not torch.equal(value.score.weight, before.score.weight)
    torch.testing.assert_close(value.score.weight, before.score.weight, rtol=0, atol=0.05)


def test_a_base_is_found_from_any_working_directory_and_after_a_move(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    sft.run(
        sft.SFTConfig(
            model="base/model",
            train_data="demonstrations.jsonl",
            output_dir="near",
            **OPTIONS,
            **SEQUENCES,
            **RANK,
        )
    )
    monkeypatch.chdir(tmp_path)
    near = runs / "near" / "model"
    assert find_source(str(near)).base == str((runs / "base" / "model").resolve())
    AutoPeftModelForCausalLM.from_pretrained(near)  # others read the absolute path
    before = logits(load_plain(str(near), task="CAUSAL_LM"))
    moved = tmp_path / "moved"
    for part in ("base", "near"):
        shutil.copytree(runs / part, moved / part)
    (runs / "base").rename(runs / "gone")
    try:
        assert find_source(str(moved / "near" / "model")).base == str((moved / "base" / "model").resolve())
        torch.testing.assert_close(
            logits(load_plain(str(moved / "near" / "model"), task="CAUSAL_LM")), before
        )
        shutil.rmtree(moved / "base")
        with pytest.raises(
            ValueError,
            match=(
                "model: got adapters in '.*' whose base model is no folder, expected "
                ".*base/model'.*base_model_name_or"
            ),
        ):
            load_architecture(str(moved / "near" / "model"))
    finally:
        (runs / "gone").rename(runs / "base")


def test_adapters_of_others_without_a_tokenizer_have_their_bases(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    lora = LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    get_peft_model(AutoModelForCausalLM.from_pretrained("base/model"), lora).save_pretrained(
        str(tmp_path / "others")
    )
    assert find_source(str(tmp_path / "others")) == ("base/model", [str(tmp_path / "others")])
    assert load_tokenizer(str(tmp_path / "others")).get_vocab() == load_tokenizer("base/model").get_vocab()


def test_what_does_not_fit_is_refused_by_name(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match="model: got '.*reward/model', the adapters of a sequence classifier .* expected a causal LM",
    ):
        load_architecture(str(runs / "reward" / "model"))
    with pytest.raises(ValueError, match="model: got '.*base/model', expected a folder of adapters"):
        merge.run(merge.MergeConfig(model=str(runs / "base" / "model"), output_dir=str(tmp_path / "out")))
    with pytest.raises(
        ValueError, match="output_dir: got '.*', which holds files, expected a new or empty folder"
    ):
        merge.run(merge.MergeConfig(model=str(runs / "sft" / "model"), output_dir=str(runs)))
    wide = shutil.copytree(runs / "sft" / "model", tmp_path / "wide")
    settings = json.loads((wide / "adapter_config.json").read_text())
    (wide / "adapter_config.json").write_text(json.dumps(settings | {"r": 8}))
    with pytest.raises(
        ValueError, match="model: got adapters in '.*wide' .*, expected ones that fit their base"
    ):
        load_plain(str(wide), task="CAUSAL_LM")
    (wide / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": ["c_attn"]}))
    with pytest.raises(
        ValueError,
        match=r"of which \d+ weights are missing or left over, .*, expected ones that fit their base",
    ):
        load_plain(str(wide), task="CAUSAL_LM")
    (wide / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(wide)}))
    with pytest.raises(ValueError, match="that name themselves as their base"):
        find_source(str(wide))


def test_folders_of_adapters_that_lack_something_are_refused_by_name(runs: Path, tmp_path: Path) -> None:
    scorer = shutil.copytree(runs / "reward" / "model", tmp_path / "scorer")
    weights = load_file(scorer / "adapter_model.safetensors")
    headless = {name: weight for name, weight in weights.items() if not name.endswith("score.weight")}
    assert len(headless) < len(weights)
    save_file(headless, scorer / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="reward: .*'.*scorer' .* weight of its head, expected score.weight"):
        load_architecture(str(scorer), task="SEQ_CLS", argument="reward")
    (scorer / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"reward: got '.*scorer' without adapter_model.safetensors"):
        load_architecture(str(scorer), task="SEQ_CLS", argument="reward")
    settings = json.loads((scorer / "adapter_config.json").read_text())
    (scorer / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match=r"reward: .*'.*scorer' .*base_model_name_or_path"):
        find_source(str(scorer), argument="reward")


def test_adapters_on_initial_weights_are_refused(pretraining: Callable[..., pretrain.PretrainConfig]) -> None:
    with pytest.raises(ValueError, match="lora_rank: got 4 with model_config, expected 0"):
        pretraining(lora_rank=4)
