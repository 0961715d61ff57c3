"""A tensor times a scalar on its device, in place; nothing is done where the scalar is 1."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import launch

BLOCK_SIZE, NUM_WARPS = 2048, 8
PROGRAMS = 2048  # where there is nothing to do, they are all that is launched


@triton.jit
def scale_kernel(
    x,  # [count]
    factor,  # scalar
    count,
    BLOCK_SIZE: tl.constexpr,
):
    """x *= factor, a scalar on the device; nothing is read or written where it is 1."""
    dtype: tl.constexpr = factor.dtype.element_ty
    f = tl.load(factor)
    if f != 1.0:
        for block in range(tl.program_id(0).to(tl.int64), tl.cdiv(count, BLOCK_SIZE), tl.num_programs(0)):
            at = block * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
            values = tl.load(x + at, mask=at < count).to(dtype)
            tl.store(x + at, values * f, mask=at < count)


def scale_in_place(x: Tensor, factor: Tensor) -> None:
    """x *= factor, a scalar on x's device. Where it is 1, as usual, x is neither read nor written.

    x must be contiguous. The product is rounded once to x's dtype.
    """
    if x.numel() == 0:
        return
    factor = factor.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    programs = min(PROGRAMS, triton.cdiv(x.numel(), BLOCK_SIZE))
    launch(scale_kernel, programs, (x, factor), (x.numel(),), BLOCK_SIZE=BLOCK_SIZE, num_warps=NUM_WARPS)
