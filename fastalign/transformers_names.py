"""Names that differ between versions of transformers, in one place."""

from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import CausalLMOutputWithPast

# The argument and output with the keys and values of earlier tokens: `past_key_values` until transformers
# 5.23, then `cache`.
CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in {field.name for field in fields(CausalLMOutputWithPast)}
)


def enable_checkpointing(model: Any) -> None:
    """Turn on gradient checkpointing in a transformers model, without reentrant autograd."""
    # transformers 5.23 renamed the method and its argument, which comes first in both.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
