"""Tiny random transformers models, and their losses and gradients in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn import functional as F

VOCAB = 97  # odd, and a multiple of no block


GQA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


MHA = {name: value for name, value in GQA.items() if name != "num_key_value_heads"}


GPT = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


OPT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "dropout": 0.0,
}


CONFIGS: dict[str, Callable[[], tf.PreTrainedConfig]] = {
    "llama": partial(tf.LlamaConfig, **GQA),
    "llama-tied": partial(tf.LlamaConfig, **GQA, tie_word_embeddings=True),
    "mistral": partial(tf.MistralConfig, **GQA),
    "qwen2": partial(tf.Qwen2Config, **GQA),
    "qwen3": partial(tf.Qwen3Config, **GQA, head_dim=8, tie_word_embeddings=True),
    "gemma2-softcap": partial(tf.Gemma2Config, **GQA, head_dim=8, final_logit_softcapping=1.5),
    "gemma3-no-softcap": partial(tf.Gemma3TextConfig, **GQA, head_dim=8, final_logit_softcapping=None),
    "cohere-multiplies": partial(tf.CohereConfig, **GQA, logit_scale=0.3),
    "cohere2-multiplies": partial(tf.Cohere2Config, **GQA, logit_scale=0.3),
    "granite-divides": partial(tf.GraniteConfig, **GQA, logits_scaling=4.0),
    "hyperclovax-multiplies": partial(tf.HyperCLOVAXConfig, **GQA, logits_scaling=4.0),
    "falcon-h1-multiplies": partial(
        tf.FalconH1Config,
        **GQA,
        lm_head_multiplier=0.5,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
    ),
    "mpt-declares-an-unused-scale": partial(
        tf.MptConfig, vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4, max_seq_len=64, logit_scale=0.5
    ),
    "phi-bias": partial(tf.PhiConfig, **MHA),
    "gpt2": partial(tf.GPT2Config, **GPT, **NO_DROPOUT),
    "gptj-bias": partial(tf.GPTJConfig, **GPT, **NO_DROPOUT, rotary_dim=4),
    "gpt-neox": partial(tf.GPTNeoXConfig, **MHA),
    "opt": partial(tf.OPTConfig, **OPT),
    "opt-project-out": partial(tf.OPTConfig, **OPT, word_embed_proj_dim=16),
    "llama4": partial(
        tf.Llama4TextConfig,
        **GQA,
        head_dim=8,
        intermediate_size_mlp=48,
        num_local_experts=2,
        no_rope_layers=[1, 1],
    ),
    "mixtral": partial(tf.MixtralConfig, **GQA, num_local_experts=2),
}


def build(
    config: tf.PreTrainedConfig,
    dtype: torch.dtype = torch.float64,
    kind: Any = tf.AutoModelForCausalLM.from_config,
) -> Any:
    """A random model in train mode whose logits reach about ±5, so that softcaps and scales matter."""
    torch.manual_seed(0)
    model = kind(config).to(dtype).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(6.0)
            elif name.endswith("bias"):
                parameter.normal_()
    return model


def llama(**changes: Any) -> Any:
    return build(tf.LlamaConfig(**{**GQA, **changes}))


def batch(rows: int = 3, length: int = 11) -> tuple[dict[str, Tensor], Tensor]:
    """Ids with a padded row, and labels with some -100."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, length - 3 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :4] = -100
    return {"input_ids": ids, "attention_mask": mask}, labels


def shift(labels: Tensor) -> Tensor:
    return F.pad(labels, (0, 1), value=-100)[:, 1:]


def model_nll(model: Any, inputs: dict[str, Tensor], targets: Tensor, temperature: float = 1.0) -> Tensor:
    """[B, T] from the model's own logits in their dtype (its own loss goes through fp32); 0 where ignored."""
    logits = model(**inputs).logits / temperature
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(
    seen: dict[str, Tensor], expected: dict[str, Tensor], relative: float = 1e-10
) -> None:
    assert seen.keys() == expected.keys() and expected
    for name, gradient in expected.items():
        difference = (seen[name] - gradient).abs().max()
        assert difference <= relative * gradient.abs().max(), (
            f"{name}: {difference} of {gradient.abs().max()}"
        )


def lora(model: Any, **options: Any) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(2)
    options = {
        "r": 2,
        "target_modules": ["q_proj"],
        "init_lora_weights": False,
        "task_type": "CAUSAL_LM",
    } | options
    return peft.get_peft_model(model, peft.LoraConfig(**options)).double()
