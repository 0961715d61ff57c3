"""How a Python float reaches a Triton kernel without losing digits.

Triton hands a Python float to a kernel as fp32 unless the parameter is annotated. Every float parameter of
our kernels is therefore annotated `tl.float64`, and the kernel converts it once to the dtype it computes in.
tests/kernels/test_triton_options.py holds both.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # on a CPU, without libdevice


@triton.jit
def as_scalar(option, dtype: tl.constexpr):
    """A float option in `dtype`. `option.to(dtype)` would not do: the interpreter passes a Python float,
    which has no `to`."""
    return tl.full((), option, dtype)
