"""8-bit matrix products with fp32 results, by csrc/int8 on CPUs with AVX-512 VNNI.

A row x [H] is coded as y ~ scale * q with q in [-127, 127], where y = R (s * x): s turns signs and R is a
Hadamard matrix in blocks, so that an outlier is spread over its block and products of rows stay what they
are. Along a basis B of 16 orthonormal rows, products are exact: B y lies beside q in fp32. csrc/int8/api.h
has the formula. An int8 matrix is taken as it is, without a rotation, and its products are exact integers.

Measured on one core of an AMD EPYC (Zen 4) at C 512, H 576, V 49152, three other processes running: 414
GOP/s where csrc/gemm does 106 GFLOP/s in fp32, 3.9 times, and torch._int_mm 228 GOP/s. With a basis it takes
1.1 times as long. Codes are multiplied exactly, so the same bits come out with any number of threads and any
split of the rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import native
from .namespace import ops

LOW = 16  # rows of a basis
LEFT, RIGHT = 8, 48  # rows of a panel: csrc/int8/api.h
LARGEST_BLOCK = 1024
CODED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


class Coding(NamedTuple):
    """How rows of a product are coded; the same for both factors."""

    width: int  # what rows are padded to with zeros
    block: int = 0  # of the rotation, a power of two that divides width; 0: none
    basis: Tensor | None = None  # [LOW, width] fp32, orthonormal rows, in the rotated coordinates


class CodedRows(NamedTuple):
    """Rows of a factor, coded and packed in panels."""

    packed: Tensor  # [...] int32
    residuals: Tensor  # [O] fp32, length of y - scale q
    lengths: Tensor  # [O] fp32, length of scale q (left) or of y without its part along the basis (right)
    coding: Coding
    left: bool


def plain_coding(hidden_size: int) -> Coding:
    """The coding of int8 factors, without rotation or basis."""
    return Coding(hidden_size)


def rotated_coding(hidden_size: int) -> Coding:
    """The coding with the largest rotation of H, padded to a multiple of 64."""
    width = -(-hidden_size // 64) * 64
    return Coding(width, min(width & -width, LARGEST_BLOCK))


def packed_size(rows: int, coding: Coding, *, left: bool) -> int:
    """Numbers of 32 bits in the panels."""
    panel = LEFT if left else RIGHT
    each = (1 if left else 2) + (0 if coding.basis is None else LOW) + -(-coding.width // 4)
    return -(-rows // panel) * panel * each


def coded_bytes(rows: int, hidden_size: int, *, left: bool) -> int:
    """Bytes of rows that are coded with a rotation and a basis, their two lengths included."""
    coding = rotated_coding(hidden_size)
    coding = coding._replace(basis=torch.empty(LOW, coding.width, device="meta"))
    return 4 * packed_size(rows, coding, left=left) + 8 * rows


def unit_stride(x: Tensor) -> Tensor:
    """x [O, H], or a copy of it where its rows do not lie in one piece."""
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


def code_rows(x: Tensor, coding: Coding, *, left: bool) -> CodedRows:
    """The rows of x [O, H], of one of `CODED_DTYPES`, coded and packed.

    A row with NaN or an infinity gets a scale of NaN, so that its products are NaN.
    """
    x = unit_stride(x)
    packed = x.new_empty(packed_size(x.shape[0], coding, left=left), dtype=torch.int32)
    norms = x.new_empty(2, x.shape[0], dtype=torch.float32)
    ops.int8_pack(x, left, coding.width, coding.block, coding.basis, packed, norms)
    return CodedRows(packed, norms[0], norms[1], coding, left)


def digest_rows(x: Tensor) -> Tensor:
    """A hash [O] int64 of the bits of each row of x [O, H]. It costs one read."""
    x = unit_stride(x)
    hashes = x.new_empty(x.shape[0], dtype=torch.int64)
    ops.int8_digest(x, hashes)
    return hashes


def mm_int8(left: CodedRows, right: CodedRows, out: Tensor) -> None:
    """Write the products of the rows of `left` and `right` into out [M, N] fp32."""
    coding = left.coding
    ops.int8_gemm(left.packed, right.packed, coding.width, coding.basis is not None, out)


def refusal(device: torch.device, dtype: torch.dtype) -> str:
    """Why there is no product of this file for factors of this dtype; empty if there is one."""
    if device.type not in ("cpu", "meta"):
        return f"these 8-bit products are for CPUs, and the tensors are on {device.type}"
    if dtype not in CODED_DTYPES:
        return f"factors of {dtype} have no 8-bit codes"
    if not native.has_int8_gemm():
        return native.missing or "this CPU has no AVX-512 VNNI"
    return ""


class CodesRef(NamedTuple):
    """What `code_rows` packs."""

    codes: Tensor  # [O, width] int8
    scales: Tensor  # [O]
    low: Tensor  # [O, LOW], or [O, 0]


def rotation_signs(width: int) -> Tensor:
    """The signs [width] of a rotation, 1 or -1 in int8."""
    mask, k = 0xFFFFFFFF, torch.arange(1, width + 1)
    hashed = k * 0x9E3779B1 & mask
    mixed = (hashed ^ hashed >> 15) * 0x85EBCA6B & mask
    return torch.where(mixed >> 31 == 1, -1, 1).to(torch.int8)


def hadamard(size: int) -> Tensor:
    """The Hadamard matrix [size, size] of a power of two: 1 or -1 in fp32."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([matrix.repeat(1, 2), torch.cat([matrix, -matrix], 1)])
    return matrix


def rotate_ref(x: Tensor, coding: Coding) -> Tensor:
    """y [O, width] of the rows of x [O, H]."""
    y = torch.nn.functional.pad(x.float(), (0, coding.width - x.shape[1]))
    if not coding.block:
        return y
    y = (y * rotation_signs(coding.width)).view(x.shape[0], -1, coding.block)
    return (y @ (hadamard(coding.block) / coding.block**0.5)).flatten(1)


def code_rows_ref(x: Tensor, coding: Coding, *, left: bool) -> CodesRef:
    """The specification of `code_rows`."""
    if x.dtype == torch.int8:
        return CodesRef(x, torch.ones(x.shape[0]), torch.empty(x.shape[0], 0))
    y, basis = rotate_ref(x, coding), coding.basis
    low = y.new_empty(y.shape[0], 0) if basis is None else y @ basis.t()
    if left and basis is not None:
        y = y - low @ basis
    largest = y.abs().amax(1, keepdim=True)
    coded = torch.isfinite(largest) & (largest >= 1e-30)
    codes = torch.where(coded, (y * (127 / largest)).round(), 0).to(torch.int8)
    scales = torch.where(torch.isfinite(largest), largest / 127 * coded, torch.nan)
    if left and basis is not None:
        low = low + (y - scales * codes) @ basis.t()
    return CodesRef(codes, scales[:, 0], low)


def mm_int8_ref(left: CodesRef, right: CodesRef) -> Tensor:
    """The specification of `mm_int8`: [M, N] fp32."""
    products = (left.codes.long() @ right.codes.long().t()).float()
    return products * right.scales * left.scales[:, None] + left.low @ right.low.t()
