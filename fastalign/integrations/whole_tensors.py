"""Sums and means over a head's rows where tensor parallelism shards them."""

from typing import Any

from torch import Tensor

from fastalign_kernels import checks


def whole(x: Any) -> Tensor:
    """The tensor; of a DTensor what all ranks have together. Not for training: the ranks' gradients would be
    summed."""
    value: Tensor = x.full_tensor() if checks.is_dtensor(x) else x
    return value
