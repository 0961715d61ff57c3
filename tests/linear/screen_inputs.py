"""Inputs of the tests of a screen."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastalign_kernels import (
    linear_token_stats,
    native,
)

needs_screen = pytest.mark.skipif(
    not native.has_int8_gemm(),
    reason="csrc/int8 needs AVX-512 VNNI, and this CPU has none (or the library is not there)",
)
N, H, V = 150, 96, 5000
Given = dict[str, Any]


def make(
    dtype: torch.dtype = torch.float32, *, tokens: int = N, hidden_size: int = H, seed: int = 0
) -> Given:
    """A trained-like head: each token's hidden state points at its id and at a few others."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.nn.functional.normalize(torch.randn(V, hidden_size, generator=generator), dim=1)
    ids = torch.randint(0, V, (tokens,), generator=generator)
    first, second = weight[torch.randint(0, V, (2, tokens), generator=generator)]
    noise = torch.randn(tokens, hidden_size, generator=generator)
    hidden = 14 * weight[ids] + 4 * first + 3 * second + 0.5 * noise
    hidden[:, 3] += 4  # an outlier coordinate, and a mean that is not 0
    weight[:, 3] *= 0.2
    ids[1] = -100
    return {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "ids": ids}


def both(given: Given, **options: Any) -> tuple[Any, Any]:
    return linear_token_stats(**given, **options), linear_token_stats(**given, screen=True, **options)
