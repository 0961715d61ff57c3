"""Ids as the kernels take them, and what a mean over their tokens multiplies each by: one launch each, where
plain PyTorch takes seven. On an H200's host a launch takes 15 to 40 us, and the head's GEMM waits for them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import launch

BLOCK_SIZE, NUM_WARPS = 4096, 8


@triton.jit
def kept_ids_kernel(
    ids,  # [N] int32 or int64
    kept,  # [N] int64
    ignore_index,
    N,
    BLOCK_SIZE: tl.constexpr,
):
    """kept = -1 where ids are ignore_index, else ids."""
    token = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    token_id = tl.load(ids + token, mask=token < N, other=0).to(tl.int64)
    tl.store(kept + token, tl.where(token_id == ignore_index, -1, token_id), mask=token < N)


@triton.jit
def mean_scale_kernel(
    ids,  # [N] int64, negative: ignored
    scale,  # [N] fp32
    N,
    BLOCK_SIZE: tl.constexpr,
):
    """1 over the number of tokens that are not ignored, 0 for those that are; NaN if all are.

    Each program counts them all: 8 N bytes from L2, and there are N / BLOCK_SIZE programs.
    """
    count = tl.full((), 0, tl.int32)
    for begin in range(0, N, BLOCK_SIZE):
        token = begin + tl.arange(0, BLOCK_SIZE)
        keep = tl.load(ids + token, mask=token < N, other=-1) >= 0
        count += tl.sum(keep.to(tl.int32), 0)
    token = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    keep = tl.load(ids + token, mask=token < N, other=-1) >= 0
    tl.store(scale + token, tl.div_rn(keep.to(tl.float32), count.to(tl.float32)), mask=token < N)


_CONSTANTS = {"BLOCK_SIZE": BLOCK_SIZE, "num_warps": NUM_WARPS}


def kept_ids(ids: Tensor, ignore_index: int) -> Tensor:
    """ids [N] as int64, -1 in place of ignore_index."""
    N = ids.shape[0]
    kept = torch.empty(N, dtype=torch.int64, device=ids.device)
    if N:
        launch(kept_ids_kernel, triton.cdiv(N, BLOCK_SIZE), (ids, kept), (ignore_index, N), **_CONSTANTS)
    return kept


def mean_scale(ids: Tensor, scale: Tensor) -> None:
    """Write scale [N] fp32: 1 over the number of ids [N] int64 that are not negative; 0 for those that
    are."""
    N = ids.shape[0]
    if N:
        launch(mean_scale_kernel, triton.cdiv(N, BLOCK_SIZE), (ids, scale), (N,), **_CONSTANTS)
