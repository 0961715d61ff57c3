"""The noise of `sample_ref`: exponentials from Philox counters, as csrc/sampling has them."""

from __future__ import annotations

import torch
from torch import Tensor


def exponential(seed: int, sequence: Tensor, position: Tensor, index: Tensor) -> Tensor:
    """E ~ Exp(1), fp64, of Philox4x32-10 with key seed and counter (index, position, sequence); sequence,
    position [B], index [B, n]."""
    low = 0xFFFFFFFF
    counter = [
        index,
        *(word[:, None].expand_as(index) for word in (position & low, sequence & low, sequence >> 32 & low)),
    ]
    key = [seed & low, seed >> 32 & low]
    for _ in range(10):  # Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011
        (high0, low0), (high1, low1) = (
            _multiplied(0xD2511F53, counter[0]),
            _multiplied(0xCD9E8D57, counter[2]),
        )
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    high, rest = counter[0].double(), (counter[1] | 1).double()
    u = high * 2**-32 + rest * 2**-64
    left = (low - high) * 2**-32 + ((low - counter[1]) | 1).double() * 2**-64
    return torch.where(high < 2**31, -torch.log1p(-u), -left.log())


def _multiplied(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of factor * word, both below 2^32, in int64."""
    part = factor * (word & 0xFFFF)
    high = factor * (word >> 16) + (part >> 16)
    return high >> 16, (high << 16 | part & 0xFFFF) & 0xFFFFFFFF
