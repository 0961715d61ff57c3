"""8-bit codes of a head's factors on a GPU, for screen.py.

They are those of gemm_int8.py, with rotations of at most LARGEST_BLOCK numbers: one product of the tensor
cores turns a row. A call codes the weight anew, since a training step changes it: on an H200 at H 4096 and V
151936 that is 1.9 GB, predicted to take 0.45 ms where an exact product of 8192 tokens takes 14.9. Nothing is
kept between calls.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...gemm_int8 import LOW, hadamard, rotation_signs
from ...triton_launch import launch
from ..screen_weight import ROUNDS, SAMPLED_ROWS

LARGEST_BLOCK = 64
ROWS, WARPS = 64, 8  # of a program; others spill


class Rotation(NamedTuple):
    """The rotation of rows that are padded with zeros to `width`."""

    width: int
    signs: Tensor  # [width] int8
    matrix: Tensor  # [block, block] bf16, 1 or -1


class GpuCodes(NamedTuple):
    """Rows of a factor, coded."""

    codes: Tensor  # [O, width] int8
    low: Tensor  # [O, 64] bf16: see screen_gemm_triton.py
    scales: Tensor  # [O] fp32
    residuals: Tensor  # [O] fp32, as those of CodedRows
    lengths: Tensor  # [O] fp32


class WeightCodes(NamedTuple):
    """A weight's codes, and the lengths that bound a logit's error; nothing of it is on the host."""

    rows: GpuCodes
    basis: Tensor  # [16, width] fp32
    rotation: Rotation
    largest_length: Tensor  # [] over the rows, of what lies outside of the basis
    largest_residual: Tensor  # []
    mean_length: Tensor  # []
    mean_residual: Tensor  # []

    def noise(self, rows: GpuCodes) -> Tensor:
        """The standard deviation [C] of the error of a hidden state's products."""
        noise = rows.residuals * self.mean_length + rows.lengths * self.mean_residual
        return noise / math.sqrt(self.rotation.width)

    def bounds(self, rows: GpuCodes) -> Tensor:
        """An upper bound on the errors of each hidden state's products, [C]."""
        return rows.residuals * self.largest_length + rows.lengths * self.largest_residual


@functools.cache
def rotation(hidden_size: int, device: torch.device) -> Rotation:
    """The rotation of rows of H numbers."""
    width = -(-hidden_size // 64) * 64
    block = min(width & -width, LARGEST_BLOCK)
    return Rotation(width, rotation_signs(width).to(device), hadamard(block).to(device, torch.bfloat16))


def code_weight(weight: Tensor) -> WeightCodes:
    """The codes of weight [V, H], unit stride over H."""
    turned = rotation(weight.shape[1], weight.device)
    basis = longest_directions(weight, turned)
    rows = _code(weight, basis, turned, left=False)
    return WeightCodes(
        rows,
        basis,
        turned,
        rows.lengths.amax(),
        rows.residuals.amax(),
        rows.lengths.square().mean().sqrt(),
        rows.residuals.square().mean().sqrt(),
    )


def code_hidden(hidden: Tensor, weight: WeightCodes) -> GpuCodes:
    """The codes of hidden states [C, H] that are multiplied by that weight."""
    return _code(hidden, weight.basis, weight.rotation, left=True)


def longest_directions(weight: Tensor, turned: Rotation) -> Tensor:
    """A basis [16, width] that spans what is nearly the longest part of sampled rows of the weight.

    By subspace iteration, as in screen_weight.py. Its rows are orthonormal up to rounding, and 0 where the
    sample spans fewer; the products are exact along any basis.
    """
    V, H = weight.shape
    rows = weight[:: max(1, V // SAMPLED_ROWS)][:SAMPLED_ROWS].float().nan_to_num(0.0, 0.0, 0.0)
    rows = torch.nn.functional.pad(rows, (0, turned.width - H))
    rows = rows / rows.abs().amax().clamp(min=1e-30)
    basis = torch.zeros(LOW, turned.width, device=weight.device)
    some = rows[:: max(1, rows.shape[0] // LOW)][:LOW]
    basis[: some.shape[0]] = some
    for _ in range(ROUNDS):
        basis = _orthonormal(basis)
        basis = (rows @ basis.t()).t() @ rows
    basis = (_orthonormal(basis) * turned.signs).view(LOW, -1, turned.matrix.shape[0])
    return (basis @ (turned.matrix.float() / turned.matrix.shape[0] ** 0.5)).flatten(1)


def _orthonormal(rows: Tensor) -> Tensor:
    """Rows with the same span, by Cholesky's factor of their products, twice. The host does not wait."""
    basis = rows.double()
    for _ in range(2):
        products = basis @ basis.t()
        shift = products.diagonal().mean() * 1e-12 + 1e-300
        factor, _ = torch.linalg.cholesky_ex(products + shift * torch.eye(LOW, device=rows.device))
        basis = torch.linalg.solve_triangular(factor, basis, upper=False)
    return basis.nan_to_num(0.0, 0.0, 0.0).float()


def _code(x: Tensor, basis: Tensor, turned: Rotation, *, left: bool) -> GpuCodes:
    (count, H), width = x.shape, turned.width
    codes = torch.empty(count, width, dtype=torch.int8, device=x.device)
    low = torch.empty(count, 4 * LOW, dtype=torch.bfloat16, device=x.device)
    numbers = torch.empty(3, count, dtype=torch.float32, device=x.device)
    launch(
        _kernels().code_kernel,
        -(-count // ROWS),
        (x, turned.signs, turned.matrix, basis, codes, low, numbers),
        (count, H, width, x.stride(0)),
        LEFT=left,
        BLOCK=turned.matrix.shape[0],
        ROWS=ROWS,
        num_warps=WARPS,
    )
    return GpuCodes(codes, low, *numbers)


def _kernels():
    from . import screen_gemm_triton  # Triton is absent on macOS and Windows

    return screen_gemm_triton
