"""Configurations and data of the first two stages that are refused, all before a model is loaded."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
)

from fastalign.stages import build, loop, pretrain, report, sft
from fastalign.stages.world import World
from tests.stages.tiny import LLAMA


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rat": 1}, "unknown key 'learning_rat'; did you mean learning_rate"),
        ({"zzz": 1}, "unknown key 'zzz'; allowed: adam_eps, attention"),
        ({"model_config": None}, "give one of model .* and model_config .*, got neither"),
        ({"model": "somewhere"}, "give one of model .* and model_config .*, got both"),
        ({"tokenizer": None}, "tokenizer is needed with model_config"),
        ({"learning_rate": -1}, "greater than 0"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        (
            {"batch_size": 6, "micro_batch_size": 4},
            r"batch_size \(6\) must be a multiple of micro_batch_size \(4\)",
        ),
        ({"epochs": 1}, r"max_steps \(7\) and epochs \(1.0\) exclude each other"),
        ({"bf16": True, "dtype": "float64"}, "bf16 autocast needs dtype float32 or bfloat16"),
        ({"eval_data": None, "eval_every": 2}, r"eval_every \(2\) needs eval_data"),
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
        ({"report_to": "wandb"}, "report_to: wandb not installed"),
        ({"train_data": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"text_column": "txt"}, "txt"),
        ({"eval_data": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"model_config": {"model_type": "lama"}}, "model_type is 'lama'; did you mean .*llama"),
        ({"model_config": LLAMA | {"hiden_size": 3}}, "unknown key 'hiden_size'; did you mean hidden_size"),
        ({"model_config": LLAMA | {"hidden_size": "big"}}, "model_config: .*hidden_size"),
        ({"model_config": "nowhere.json"}, "model_config: no file 'nowhere.json'"),
        (
            {"model_config": LLAMA | {"vocab_size": 100}},
            r"tokenizer: \d+ tokens do not fit .* vocab_size 100",
        ),
        (
            {"model_config": LLAMA | {"max_position_embeddings": 8}},
            r"a sequence of \d+ tokens does not fit .* 8 \(max_position_embeddings\)",
        ),
        ({"attention": "flash_attention_2"}, "flash_attention_2 needs .*a CUDA device and half precision"),
        ({"liger": True}, "liger: true needs .*a CUDA device"),
    ],
)
def test_what_cannot_run_is_refused_before_the_model_loads(
    pretraining: Callable[..., pretrain.PretrainConfig],
    no_model: None,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    message: str,
) -> None:
    find = report.importlib.util.find_spec
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    with pytest.raises(ValueError, match=message):
        pretrain.run(pretraining(**changes))


def test_bad_demonstrations_are_refused_before_the_model_loads(
    tuning: Callable[..., sft.SFTConfig], files: dict[str, str], no_model: None
) -> None:
    with pytest.raises(ValueError, match=r"bad\.jsonl.*2"):
        sft.run(tuning(train_data=files["bad"]))
    with pytest.raises(ValueError, match=r"a sequence of \d+ tokens does not fit .* 64 \(max_position_embeddings\)"):
        sft.run(tuning(train_data=files["long"], max_length=512))


def test_an_adapter_on_lm_head_is_refused_before_the_first_step(
    tuning: Callable[..., sft.SFTConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sft, "train", lambda *arguments, **options: pytest.fail("training began"))
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has a peft.* as its lm_head"):
        sft.run(tuning(lora_rank=2, lora_targets=["c_attn", "lm_head"]))


def test_liger_is_refused_for_a_model_that_it_has_no_layers_for(tuning: Callable[..., sft.SFTConfig], base: str, no_model: None) -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    config, world = tuning(liger=True), World(0, 1, torch.device("cpu"))
    with pytest.raises(ValueError, match="liger: true, but liger-kernel has no layers for gpt2"):
        build.load_model(config, world, AutoConfig.from_pretrained(base), weights=base, attention="sdpa", packed=False)


def test_a_cuda_device_that_is_not_there_is_refused(
    pretraining: Callable[..., pretrain.PretrainConfig],
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(ValueError, match="device: cuda was asked for"):
        pretrain.run(pretraining(device="cuda"))


def test_a_batch_that_the_devices_do_not_divide_is_refused(
    pretraining: Callable[..., pretrain.PretrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "join_world", lambda device: nullcontext(World(0, 3, torch.device(device))))
    with pytest.raises(ValueError, match=r"batch_size \(4\) must be .* micro_batch_size x devices \(1 x 3\)"):
        pretrain.run(pretraining())
