"""What each token counts in a policy loss: `aggregation` and `normalizer` in the form that the kernels
take."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor


class Weighting(IntEnum):
    """How the weight of a token inside the mask follows from `TokenWeights`."""

    GIVEN = 0  # the tensor, [1] or one for each token, fp32 or fp64
    NUMBER = 1  # the number
    TOKENS = 2  # one over the tokens inside the mask
    DIVISOR = 3  # one over the tensor, a scalar
    # Of [B, T]: 1 / the tokens of its row, divided by the tensor (a scalar) or the number; without either, by
    # the number of rows that have tokens.
    SEQUENCES = 4


class TokenWeights(NamedTuple):
    """The weights of tokens before they are computed: a kernel can count the tokens itself."""

    kind: Weighting
    tensor: Tensor | None = None
    number: float = 0.0

    @classmethod
    def of(cls, tensor: Tensor | None, kind: float, number: float) -> TokenWeights:
        """The weights that an op's arguments describe."""
        return cls(Weighting(int(kind)), tensor, number)

    def computed(self, mask: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, float]:
        """The weights as a tensor, [1] or of the mask's shape; or None and a number for all tokens, which is
        0 for one over the tokens inside the mask.

        A weight is infinite where there is nothing to average. No token is multiplied with it.
        """
        if self.kind == Weighting.GIVEN:
            return self.tensor, 0.0
        if self.kind in (Weighting.NUMBER, Weighting.TOKENS):
            return None, self.number
        if self.kind == Weighting.DIVISOR:
            assert self.tensor is not None
            return self.tensor.to(dtype).reciprocal().view(1), 0.0
        counts = mask.sum(1, keepdim=True)
        divisor = self.tensor if self.tensor is not None else self.number or (counts > 0).sum()
        # In `dtype` before the product: a count times a number would be fp32.
        return (counts.expand_as(mask).to(dtype) * divisor).reciprocal(), 0.0

    def as_tensor(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """The weights as a tensor, [1] or of the mask's shape."""
        tensor, number = self.computed(mask, dtype)
        if tensor is not None:
            return tensor
        if number:
            return torch.full((1,), number, dtype=dtype, device=mask.device)
        return mask.sum(dtype=torch.int32).to(dtype).reciprocal().view(1)
