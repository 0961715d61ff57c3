"""Small inputs of several functions."""

from collections.abc import Callable

import torch
from torch import Tensor

LENGTHS: dict = {"chosen_lengths": torch.tensor([2, 3]), "rejected_lengths": torch.tensor([1, 4])}
DESIRABLE = torch.tensor([True, False])


def normal_numbers(dtype: torch.dtype) -> tuple[Callable[..., Tensor], torch.Generator]:
    """A function from a shape to normal numbers, the same in each run, and the generator that it uses."""
    generator = torch.Generator().manual_seed(0)
    return (lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)), generator
