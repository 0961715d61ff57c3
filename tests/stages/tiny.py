"""Tiny data and models for the stages' tests, and what a run left behind."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from bench.core.words import WORDS as WORDS
from fastalign.stages.config import TrainConfig
from fastalign.stages.models import loading

GPT2 = {
    "model_type": "gpt2",
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "initializer_range": 0.2,
}  # and its dropout of 0.1
LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
# What the clock says in a line of metrics.jsonl.
CLOCK = (
    *("seconds", "seconds_rollout", "seconds_update"),
    *("tokens_per_second", "pairs_per_second", "rows_per_second", "episode_per_second"),
)


def sentence(number: int) -> str:
    """Ragged on purpose: 3 to 14 words."""
    return " ".join(
        WORDS[(number * 5 + 3 * place * place) % len(WORDS)] for place in range(3 + number * 5 % 12)
    )


def write(path: Path, rows: Iterable[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def save_tokenizer(folder: Path, special: tuple[str, ...] = ("<eos>", "<pad>"), **options: Any) -> str:
    """A byte-level BPE tokenizer of 300 entries, the special ones first."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        map(sentence, range(40)), vocab_size=300, special_tokens=list(special), show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<eos>", pad_token="<pad>", **options
    )
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_base(folder: Path, tokenizer_folder: str, length: int, **architecture: Any) -> str:
    """An untrained tiny GPT-2 in fp64 (Llama's norms are fp32 whatever the dtype), with the tokenizer."""
    tokenizer = loading.load_tokenizer(tokenizer_folder)
    torch.manual_seed(3)
    config = loading.scratch_config(GPT2 | architecture, tokenizer, length=length)
    AutoModelForCausalLM.from_config(config, dtype=torch.float64).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def weights(config: TrainConfig, part: str = "model") -> dict[str, torch.Tensor]:
    return load_file(
        Path(
            config.output_dir, part, "adapter_model.safetensors" if config.lora_rank else "model.safetensors"
        )
    )


def read_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by name, those of all ranks put together."""
    reader = FileSystemReader(checkpoint)
    described: dict[str, Any] = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in described.items()
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def lines(config: TrainConfig) -> list[dict[str, Any]]:
    """metrics.jsonl without what the clock says."""
    parsed = [json.loads(line) for line in Path(config.output_dir, "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in parsed]


def assert_close(
    one: TrainConfig,
    other: TrainConfig,
    *,
    atol: float,
    rel: float,
    parts: tuple[str, ...] = ("model",),
    shown: Callable[[TrainConfig], list[dict[str, Any]]] = lines,
) -> None:
    """Weights, and the metrics of every step: a wrong scale of the loss hardly moves AdamW, but the logged
    gradient norm shows it."""
    for part in parts:
        expected, found = weights(one, part), weights(other, part)
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=atol)
    assert len(shown(one)) == len(shown(other))
    for a, b in zip(shown(one), shown(other), strict=True):
        assert b == pytest.approx(a, rel=rel, abs=atol)


def torchrun(processes: int, module: str, *arguments: str) -> None:
    """Run a stage in so many processes; one that hangs at its end fails the test."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, "-m", module, *arguments], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]


def undescribed(config: type) -> list[str]:
    """The fields of a configuration whose class has no docstring for them."""
    return [
        name
        for kind in config.__mro__
        for name in getattr(kind, "__annotations__", {})
        if name in (fields := getattr(kind, "__pydantic_fields__", {})) and not fields[name].description
    ]
