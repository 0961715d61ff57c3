"""Configurations and data of the first two stages that are refused, all before a model is loaded."""

import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
)

from fastalign.data import Tokenized
from fastalign.stages import loop, pretrain, sft
from fastalign.stages.models import hub_names, loading
from fastalign.stages.runs import reporters
from fastalign.stages.runs.distributed import World
from fastalign.stages.stage_configs import CONFIGS
from tests.stages.tiny import LLAMA, write


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rat": 1}, "got the unknown key 'learning_rat', expected learning_rate"),
        ({"zzz": 1}, "got the unknown key 'zzz', expected one of adam_eps, async_checkpoints"),
        ({"model_config": None}, "model and model_config: got neither"),
        ({"model": "somewhere"}, "model and model_config: got both"),
        ({"tokenizer": None}, "tokenizer: got null with model_config"),
        ({"learning_rate": -1}, "greater than 0"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        (
            {"batch_size": 6, "micro_batch_size": 4},
            r"batch_size: got 6, expected a multiple of micro_batch_size \(4\)",
        ),
        ({"epochs": 1}, r"max_steps: got 7 and epochs 1.0, expected one of the two"),
        ({"bf16": True, "dtype": "float64"}, "dtype: got float64 with bf16, expected float32 or bfloat16"),
        ({"eval_data": None, "eval_every": 2}, r"eval_every: got 2 without eval_data"),
        ({"report_to": "tensorbord"}, "tensorboard.*wandb.*trackio"),
    ],
)
def test_a_wrong_configuration_is_refused_by_name(
    pretraining: Callable[..., pretrain.PretrainConfig], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pretraining(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"report_to": "wandb"}, "report_to: got wandb, expected installed packages"),
        ({"train_data": "nowhere.jsonl"}, "nowhere.jsonl: got no such file"),
        ({"train_split": "test"}, "^train_split: got 'test', expected 'train' for files"),
        ({"eval_split": "test"}, "^eval_split: got 'test', expected 'train' for files"),
        ({"text_column": "txt"}, "txt"),
        ({"eval_data": "nowhere.jsonl"}, "nowhere.jsonl: got no such file"),
        ({"model_config": {"model_type": "lama"}}, "got model_type 'lama', expected .*llama"),
        (
            {"model_config": LLAMA | {"hiden_size": 3}},
            "got the unknown key 'hiden_size', expected hidden_size",
        ),
        ({"model_config": LLAMA | {"hidden_size": "big"}}, "model_config: .*hidden_size"),
        ({"model_config": "nowhere.json"}, "model_config: got 'nowhere.json', which is no file"),
        (
            {"model_config": LLAMA | {"vocab_size": 100}},
            r"tokenizer: got \d+ tokens, expected at most the model's vocab_size 100",
        ),
        (
            {"model_config": LLAMA | {"max_position_embeddings": 8}},
            r"got a sequence of \d+ tokens, expected at most the model's 8 \(max_position_embeddings\)",
        ),
        ({"attention": "flash_attention_2"}, "got flash_attention_2, .*a CUDA device and half precision"),
        ({"liger": True}, "liger: got true, expected false without .*a CUDA device"),
    ],
)
def test_what_cannot_run_is_refused_before_the_model_loads(
    pretraining: Callable[..., pretrain.PretrainConfig],
    no_model: None,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    message: str,
) -> None:
    find = reporters.importlib.util.find_spec
    monkeypatch.setattr(
        reporters.importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name)
    )
    with pytest.raises(ValueError, match=message):
        pretrain.run(pretraining(**changes))


def test_bad_demonstrations_are_refused_before_the_model_loads(
    tuning: Callable[..., sft.SFTConfig], files: dict[str, str], no_model: None
) -> None:
    with pytest.raises(ValueError, match=r"bad\.jsonl.*2"):
        sft.run(tuning(train_data=files["bad"]))
    with pytest.raises(
        ValueError,
        match=r"got a sequence of \d+ tokens, expected at most the model's 64 \(max_position_embeddings\)",
    ):
        sft.run(tuning(train_data=files["long"], max_length=512))


def test_liger_is_refused_for_a_model_that_it_has_no_layers_for(
    tuning: Callable[..., sft.SFTConfig], base: str, no_model: None
) -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    config, world = tuning(liger=True), World(0, 1, torch.device("cpu"))
    with pytest.raises(
        ValueError, match="liger: got true, expected false: liger-kernel has no layers for gpt2"
    ):
        loading.load_model(
            config, world, AutoConfig.from_pretrained(base), weights=base, attention="sdpa", packed=False
        )


def test_a_cuda_device_that_is_not_there_is_refused(
    pretraining: Callable[..., pretrain.PretrainConfig],
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(ValueError, match="device: got cuda, expected auto or cpu"):
        pretrain.run(pretraining(device="cuda"))


def test_a_batch_that_the_devices_do_not_divide_is_refused(
    pretraining: Callable[..., pretrain.PretrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        loop, "join_world", lambda device, timeout: nullcontext(World(0, 3, torch.device(device)))
    )
    with pytest.raises(
        ValueError, match=r"batch_size: got 4, expected .* micro_batch_size x devices \(1 x 3\)"
    ):
        pretrain.run(pretraining())


@pytest.fixture
def longrope(files: dict[str, str], tmp_path: Path) -> str:
    """The folder of a tiny Phi-3 whose RoPE changes at 16 tokens."""
    tokenizer = loading.load_tokenizer(files["tokenizer"])
    ropes = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    fields = {name: value for name, value in LLAMA.items() if name != "head_dim"}
    fields |= {"model_type": "phi3", "original_max_position_embeddings": 16, "rope_parameters": ropes}
    model = AutoModelForCausalLM.from_config(
        loading.scratch_config(fields, tokenizer, length=64), dtype=torch.float64
    )
    model.save_pretrained(tmp_path / "phi3")
    tokenizer.save_pretrained(tmp_path / "phi3")
    return str(tmp_path / "phi3")


def test_rows_on_both_sides_of_a_longrope_switch_are_refused_unless_each_is_alone(
    tuning: Callable[..., sft.SFTConfig], longrope: str
) -> None:
    remedy = "lower sequence_length or max_length, or set packing=false and micro_batch_size=1"
    message = (
        r"got sequences of \d+ to \d+ tokens for one forward pass, .* 16 tokens "
        rf"\(original_max_position_embeddings .*: {remedy}"
    )
    for changes in ({"packing": True}, {"packing": True, "micro_batch_size": 1}, {"packing": False}):
        with pytest.raises(ValueError, match=message):
            sft.run(tuning(model=longrope, **changes))
    assert math.isfinite(
        sft.run(tuning(model=longrope, packing=False, micro_batch_size=1, batch_size=2))["nll"]
    )
    short = write(
        Path(longrope, "short.jsonl"),
        [{"prompt": "a film", "completion": " good"}, {"prompt": "the actor", "completion": " bad"}],
    )
    assert math.isfinite(
        sft.run(tuning(model=longrope, packing=True, max_length=16, train_data=short, batch_size=1))["nll"]
    )


def test_an_id_that_the_model_lacks_is_refused_only_where_a_row_uses_it(
    tuning: Callable[..., sft.SFTConfig],
    files: dict[str, str],
    base: str,
    no_model: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    tokenizer = loading.load_tokenizer(base)
    tokenizer.add_special_tokens({"pad_token": "<padding>", "additional_special_tokens": ["<tool>"]})
    tokenizer.save_pretrained(tmp_path / "larger")
    assert (
        len(tokenizer) == 302
        and loading.padding_id(tokenizer, AutoConfig.from_pretrained(base)) == tokenizer.eos_token_id
    )
    loaded: list[str] = []
    monkeypatch.setattr(sft, "load_model", lambda *arguments, **options: loaded.append("model"))
    monkeypatch.setattr(sft, "stop_at", lambda *arguments: None)
    monkeypatch.setattr(sft, "announce", lambda *arguments, **options: None)
    monkeypatch.setattr(sft, "train", lambda *arguments, **options: {})
    sft.run(tuning(tokenizer=str(tmp_path / "larger")))
    assert loaded == ["model"]
    rows = [
        {"prompt": "a film", "completion": " good"},
        {"prompt": "the actor", "completion": " never <tool>"},
    ]
    message = (
        r"tokenizer: got 302 tokens, expected at most .* vocab_size 300: 1 sequences use ids beyond it, "
        r"such as '<tool>' \(id 301\) in the row that begins 'the actor"
    )
    with pytest.raises(ValueError, match=message):
        sft.run(tuning(tokenizer=str(tmp_path / "larger"), train_data=write(tmp_path / "rows.jsonl", rows)))


TEXT = {name: value for name, value in LLAMA.items() if name != "model_type"}
COMPOSITE: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": TEXT,
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
    },
    "llama4": {"text_config": {**TEXT, "intermediate_size_mlp": 48, "num_local_experts": 2}},
    "qwen3_5": {"text_config": {**TEXT, "layer_types": ["full_attention"] * 2}},
}


@pytest.mark.parametrize("kind", COMPOSITE)
def test_models_of_several_parts_are_fitted_by_their_language_model(
    pretraining: Callable[..., pretrain.PretrainConfig], files: dict[str, str], kind: str
) -> None:
    tokenizer = loading.load_tokenizer(files["tokenizer"])
    config = loading.scratch_config({"model_type": kind} | COMPOSITE[kind], tokenizer, length=40)
    text = config.get_text_config()
    assert (text.vocab_size, text.max_position_embeddings, text.eos_token_id, text.hidden_size) == (
        300,
        40,
        tokenizer.eos_token_id,
        32,
    )
    row = [Tokenized(list(range(41)), [True] * 41)]
    assert (
        loading.check_fit(config, tokenizer, [[Tokenized(row[0].input_ids[:40], row[0].trained[:40])]]) == 40
    )
    with pytest.raises(ValueError, match=r"got a sequence of 41 tokens, expected at most the model's 40"):
        loading.check_fit(config, tokenizer, [row])
    with pytest.raises(ValueError, match=r"got the unknown key 'hiden_size', expected hidden_size"):
        loading.scratch_config({"model_type": kind, "text_config": {"hiden_size": 3}}, tokenizer, length=40)


def no_hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub that cannot be reached, as huggingface_hub tells it; the addresses that were asked for."""
    asked: list[str] = []

    def refuse(url: str, **options: Any) -> None:
        asked.append(url)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    hub_names.check_name.cache_clear()
    return asked


@pytest.mark.parametrize(
    ("field", "stage"),
    [
        ("model", "sft"),
        ("tokenizer", "sft"),
        ("reward", "ppo"),
        ("value_model", "ppo"),
        ("model", "pretrain"),
    ],
)
def test_a_name_that_is_nowhere_is_told_at_once(
    field: str, stage: str, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = no_hub(monkeypatch)
    given = {"model": base, "reward": base, "train_data": "rows.jsonl", "output_dir": "out"}
    given = {name: value for name, value in given.items() if stage == "ppo" or name != "reward"} | {
        field: "foo/bar"
    }
    with pytest.raises(ValueError) as refused:
        hub_names.check_names(CONFIGS[stage](**given))
    expected = (
        f"{field}: got 'foo/bar', expected a folder here, or a model in the cache or on the hub: "
        "the hub cannot be reached (Name or service not known)"
    )
    assert str(refused.value) == expected
    assert len(asked) == 1, "one question, no retries"


def test_a_name_in_the_cache_is_taken_from_there_where_the_hub_is_away(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_hub(monkeypatch)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: "/cache/config.json")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        datasets.config, "HF_HUB_OFFLINE", False
    )  # so that it is put back for the tests behind this one
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    hub_names.check_name("model", "foo/bar")
    hub_names.check_name("tokenizer", "foo/bar")
    assert huggingface_hub.constants.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "1"
    assert capsys.readouterr().err == "the hub cannot be reached: models come from the cache\n"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "runs/sft/modle",
            "model: got 'runs/sft/modle', expected a folder here, or the name of a model on the hub",
        ),
        (
            "{tmp}/run",
            "model: got folder '{tmp}/run' without config.json, expected a model's folder; "
            "did you mean '{tmp}/run/model'?",
        ),
        ("{tmp}", "model: got folder '{tmp}' without config.json, expected a model's folder"),
    ],
)
def test_a_folder_that_is_no_models_is_told(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_hub(monkeypatch)
    (tmp_path / "run" / "model").mkdir(parents=True)
    with pytest.raises(ValueError) as refused:
        hub_names.check_name("model", name.format(tmp=tmp_path))
    assert str(refused.value) == message.format(tmp=tmp_path)


def test_what_attention_lacks_is_said_where_there_is_a_gpu_alone(capsys: pytest.CaptureFixture[str]) -> None:
    config = sft.SFTConfig(model="m", train_data="rows.jsonl", output_dir="out")
    loading.choose_attention(config, World(0, 1, torch.device("cpu")))
    assert capsys.readouterr().out == ""
    loading.choose_attention(config, World(0, 1, torch.device("cuda")))
    assert "attention: sdpa (flash_attention_2 needs" in capsys.readouterr().out
