"""The specification of screened logits (screen.py) in plain PyTorch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..gemm_int8 import code_rows_ref, mm_int8_ref, rotated_coding
from ..softmax.rows import Transform, row_stats_ref, transform_ref
from .screen import EXACT_EPS
from .screen_weight import longest_directions


class ScreenedRef(NamedTuple):
    stats: Tensor  # [7, N]
    logits: Tensor  # [N, V] raw: exact in `exact`, 8-bit elsewhere
    exact: Tensor  # [N, V] bool


def screened_stats_ref(
    hidden: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None, transform: Transform
) -> ScreenedRef:
    """Statistics of tokens whose ids are not ignored; columns that are nearly the largest stay in 8 bits."""
    coding = rotated_coding(weight.shape[1])
    coding = coding._replace(basis=longest_directions(weight, coding))
    raw8 = mm_int8_ref(code_rows_ref(hidden, coding, left=True), code_rows_ref(weight, coding, left=False))
    z8 = transform_ref(raw8, bias, transform)
    exact = z8 > z8.logsumexp(-1, keepdim=True) + math.log(EXACT_EPS)
    exact |= z8 == z8.amax(-1, keepdim=True)
    exact[torch.arange(ids.numel()), ids] = True
    logits = torch.where(exact, hidden.float() @ weight.float().t(), raw8)
    return ScreenedRef(row_stats_ref(logits, ids, bias, transform), logits, exact)
