"""Packed sequences: where they begin and end in a tensor of tokens, and sums over each."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks


def sum_by_sequence(values: Tensor, cu_seqlens: Tensor, *, mean: bool = False) -> Tensor:
    """Sum (or mean) of packed per-token values over each sequence: values [N], cu_seqlens [S+1] -> [S].

    cu_seqlens starts at 0, does not decrease, and ends at N, as flash-attn's does. fp32 sums (fp64 for fp64),
    in a fixed order, so they are deterministic; the gradient is the sequence's upstream gradient at each of
    its tokens. An empty sequence sums to 0 and its mean is NaN.

    Raises:
        ValueError: wrong shape, dtype or device; on a CPU also cu_seqlens that do not describe values.
    """
    checks.tensors(values=values)
    checks.flags(mean=mean)
    if values.dim() != 1:
        raise ValueError(f"values: got shape {list(values.shape)}, expected [N]")
    checks.dtype("values", values, checks.FLOATS)
    check_cu_seqlens(cu_seqlens, "values", values)
    accumulated = values if values.dtype == torch.float64 else values.float()
    # fp64 inside: a sequence of 10^5 tokens summed one by one in fp32 would lose 3 digits.
    sums = torch.segment_reduce(
        accumulated.double(), "sum", offsets=cu_seqlens.long(), unsafe=True, initial=0
    ).to(accumulated.dtype)
    return sums / cu_seqlens.diff() if mean else sums


def check_cu_seqlens(value: Tensor, like_name: str, like: Tensor, check: bool = False) -> None:
    """Integers [S + 1] on the device of `like`, [N]; where `readable` also 0 <= ... <= N without a
    decrease."""
    checks.tensors(cu_seqlens=value)
    checks.dtype("cu_seqlens", value, checks.INTEGERS)
    checks.device("cu_seqlens", value, like_name, like)
    if value.dim() != 1 or value.numel() < 1 or like.dim() != 1:
        raise ValueError(
            f"cu_seqlens: got shape {list(value.shape)} with {like_name} {list(like.shape)}, "
            "expected [S + 1] and [N]"
        )
    if checks.readable(value, check):
        ends, N = value.tolist(), like.shape[0]
        if ends[0] != 0 or ends[-1] != N or any(b < a for a, b in zip(ends, ends[1:])):
            got = f"{ends[:8]}{'...' if len(ends) > 8 else ''}"
            raise ValueError(f"cu_seqlens: got {got}, expected 0 <= ... <= N = {N} without a decrease")
