"""Tiny random transformers models, prompts of several lengths, and their greedy continuation in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from fastalign.rollout import Rollout, generate
from tests.models import tiny_models
from tests.models.tiny_models import VOCAB

PAD, NEW = 0, 13  # more than POLL steps, and no multiple of it


GQA = tiny_models.GQA | {"eos_token_id": None}
GPT = tiny_models.GPT | {"eos_token_id": None}


CONFIGS: dict[str, Callable[[], tf.PreTrainedConfig]] = {
    "llama": partial(tf.LlamaConfig, **GQA),
    "qwen2": partial(tf.Qwen2Config, **GQA),
    "qwen3-tied": partial(tf.Qwen3Config, **GQA, head_dim=8, tie_word_embeddings=True),
    "mistral-window": partial(tf.MistralConfig, **GQA, sliding_window=4),
    "gemma2-alternating-window": partial(
        tf.Gemma2Config, **GQA, head_dim=8, sliding_window=4, final_logit_softcapping=4.0
    ),
    "llama4-chunks": partial(
        tf.Llama4TextConfig,
        **GQA,
        head_dim=8,
        intermediate_size_mlp=48,
        num_local_experts=2,
        no_rope_layers=[1, 0],
        attention_chunk_size=4,
    ),
    "gpt2": partial(tf.GPT2Config, **GPT),
    "bloom-alibi": partial(
        tf.BloomConfig, vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, eos_token_id=None
    ),
}


def build(config: tf.PreTrainedConfig, **kind: Any) -> Any:
    """A random fp32 model in eval mode whose distributions are neither flat nor the same for every input."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config, **kind).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 or name.endswith("bias"):
                parameter.normal_(std=0.12)
    return model


def llama(**changes: Any) -> Any:
    return build(tf.LlamaConfig(**{**GQA, **changes}))


def prompts(lengths: tuple[int, ...] = (9, 3, 6, 1), width: int = 9) -> tuple[Tensor, Tensor]:
    """Prompts of these lengths, left-padded; 31 and 95 sit in the sign bit of an int32 word, and come
    twice."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (len(lengths), max(lengths)), generator=generator)
    ids[0, :4] = torch.tensor([31, 95, 31, 95])
    ids = torch.nn.functional.pad(ids, (width - ids.shape[1], 0), value=PAD)
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return ids.masked_fill(mask == 0, PAD), mask


def draw(model: Any, batch: tuple[Tensor, Tensor] | None = None, **options: Any) -> Rollout:
    ids, mask = batch or prompts()
    return generate(
        model, ids, mask, **{"max_new_tokens": NEW, "seed": 7, "eos_id": None, "pad_id": PAD, **options}
    )


def assert_same(one: Rollout, other: Rollout) -> None:
    """Bitwise the same rollout, with the same kept ids or without."""
    assert (one.kept_ids is None) == (other.kept_ids is None)
    assert all(torch.equal(a, b) for a, b in zip(one[:-1], other[:-1], strict=True))
    if one.kept_ids is not None and other.kept_ids is not None:
        assert all(torch.equal(a, b) for a, b in zip(one.kept_ids, other.kept_ids, strict=True))


@contextmanager
def calls_of(model: Any, change: Callable[[Tensor, int], None] = lambda logits, call: None):
    """The number of tokens of each forward; `change` may write into its logits."""
    calls: list[int] = []

    def record(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        change(output.logits, len(calls))
        calls.append(kwargs["input_ids"].shape[1])

    handle = model.register_forward_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()
