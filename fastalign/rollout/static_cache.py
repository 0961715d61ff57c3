"""A static cache of keys and values, at full length in every layer.

Sliding-window layers are at full length too: transformers' windowed layer decides on the host when it is
full and rolls, which a CUDA graph cannot replay. The window stays in the attention mask.
"""

from typing import Any

from torch import Tensor
from transformers import (
    StaticCache,
)
from transformers.cache_utils import StaticLayer

from ..probe import unsupported


class _Layer(StaticLayer):
    """transformers' static layer, but keys and values each have a dtype: autocast makes them differ."""

    values: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.values = self.values.to(value_states.dtype)


def static_cache(base: Any, length: int) -> StaticCache:
    """Keys and values of `length` tokens in every layer that stores its own."""
    try:
        cache = StaticCache(config=base.config, max_cache_len=length)
    except KeyError as error:
        raise unsupported(
            base, f"has layers of type {error}", expected="layers that have a static cache"
        ) from error
    kinds = [type(layer).__name__ for layer in cache.layers]
    # A DummyLayer reads the keys and values of another layer.
    unknown = set(kinds) - {"StaticLayer", "StaticSlidingWindowLayer", "DummyLayer"}
    if unknown:
        raise unsupported(
            base,
            f"keeps {', '.join(sorted(unknown))}, which padding on the left would enter",
            expected="keys and values alone",
        )
    cache.layers = [
        layer if kind == "DummyLayer" else _Layer(length)
        for kind, layer in zip(kinds, cache.layers, strict=True)
    ]
    return cache


def check_written(base: Any, cache: StaticCache, tokens: int) -> None:
    """Raise UnsupportedModelError unless the prefill wrote its `tokens` into every layer of the cache."""
    lengths = [layer.cumulative_length.cpu() for layer in cache.layers if type(layer) is _Layer]
    if not lengths or any(length != tokens for length in lengths):
        raise unsupported(
            base,
            f"wrote {[int(n) for n in lengths]} tokens into the layers of its static cache",
            expected=f"the {tokens} that it was given in each",
        )
