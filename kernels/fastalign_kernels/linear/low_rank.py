"""LoRA on the head: logits of W + s B A, without that sum in memory.

    z = X W^T + U B^T + bias,    U = s X A^T [N, r]; with dropout, which PEFT has, U = s dropout(X) A^T

To the engines this is a second, thin product of the logits: one GEMM of rank r that accumulates. With G the
gradient of the logits, dX = G W, dU = G B and dB = G^T U. U is made here in plain PyTorch, so autograd adds
s dU A to dX and gives dA = s dU^T X. With a frozen W no [V, H] exists beside W itself, neither a sum nor a
gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import checks
from ..softmax.rows import accumulator_dtype
from ..torch_func import without_autocast


class LowRank(NamedTuple):
    """A LoRA adapter of the head: its weight is weight + scale * B @ A. What `lora=` takes."""

    A: Tensor  # [r, H]
    B: Tensor  # [V, r]
    scale: float  # PEFT's lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA
    hidden: Tensor | None = None  # [..., H], what A reads: dropout(hidden). None: hidden itself


class ThinProduct(NamedTuple):
    """What an adapter adds to the raw logits: hidden @ weight.T."""

    hidden: Tensor  # U [N, r] of the accumulator's dtype
    weight: Tensor  # B [V, r], of the head's dtype or fp32


def as_low_rank(lora: object) -> LowRank | None:
    """An adapter from a `LowRank` or another tuple of its fields; None is none.

    Raises:
        ValueError: no tuple of two matrices of one rank, and a number.
    """
    if lora is None:
        return None
    if not isinstance(lora, (tuple, list)) or not 3 <= len(lora) <= 4:
        raise ValueError(f"lora: got {checks.shown(lora)}, expected (A [r, H], B [V, r], scale) or None")
    A, B, scale, *dropped = lora
    checks.tensor("lora", A)
    checks.tensor("lora", B)
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1] or A.shape[0] == 0:
        raise ValueError(
            f"lora: got A {list(A.shape)} and B {list(B.shape)}, expected [r, H] and [V, r] with one r >= 1"
        )
    return LowRank(A, B, checks.number("lora", scale, expected="a finite number as its scale"), *dropped)


def thin_product(
    lora: LowRank, hidden: Tensor, ids: Tensor, weight: Tensor, allowed: tuple[torch.dtype, ...]
) -> ThinProduct:
    """The second product of a head call, differentiable; hidden [N, H] and ids [N] as in `HeadInputs`.

    U and its gradient are fp32 (fp64 for fp64), and the gradient of A is rounded once. A GEMM whose B is in
    16 bits rounds U to them as it reads it, as it does dlogits; beside an fp32 B a CPU rounds nothing. It
    costs 2 N H r flops, and saves 4 N H bytes for the gradient of A. Ignored tokens enter as zeros: their
    hidden states may hold anything.

    Raises:
        ValueError: an adapter that does not fit the head, or has another dtype or device.
    """
    A, B, scale, dropped = lora
    (V, H), r = weight.shape, A.shape[0]
    checks.shape("lora", A, (r, H), "A [r, H]")
    checks.shape("lora", B, (V, r), "B [V, r]")
    checks.dtype("lora", A, allowed)
    checks.dtype("lora", B, allowed)
    checks.device("lora", A, "hidden", hidden)
    checks.device("lora", B, "hidden", hidden)
    if dropped is not None:
        checks.tensor("lora", dropped)
        checks.dtype("lora", dropped, checks.FLOATS)
        checks.device("lora", dropped, "hidden", hidden)
        if dropped.dim() < 1 or dropped.shape[-1] != H or dropped.numel() != hidden.numel():
            raise ValueError(
                f"lora: got hidden {list(dropped.shape)}, expected the shape of hidden, of {hidden.numel()} "
                "numbers"
            )
        hidden = dropped.reshape(-1, H)
    dtype = accumulator_dtype(hidden.dtype)
    states = torch.where((ids >= 0)[:, None], hidden, 0).to(dtype)
    with without_autocast(hidden):
        return ThinProduct(F.linear(states, A.to(dtype)) * scale, B)
