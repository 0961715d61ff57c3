"""What the engines ask of a CUDA device, and which heads it cannot screen."""

from __future__ import annotations

import functools

import torch

from ... import gemm_int8, native
from ...torch_func import assumed_constant
from .plan import GpuCall, screen_refusal


@assumed_constant
@functools.cache
def architecture(index: int | None) -> int:
    """The compute capability of a CUDA device, 90 for an H100."""
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """The number of a device's multiprocessors."""
    if device.type != "cuda":
        return 2  # Triton's interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count


def no_screen(device: torch.device, dtype: torch.dtype) -> str:
    """Why a head of this dtype cannot be screened on this device; empty if it can."""
    if device.type != "cuda":
        return gemm_int8.refusal(device, dtype)
    if native.triton_missing:
        return native.triton_missing
    some = GpuCall(4096, 1024, 4096, dtype, 0.0, hidden_grad=False, head_grad=False)
    return screen_refusal(some._replace(architecture=architecture(device.index)))
