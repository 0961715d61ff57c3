"""Which heads a device cannot screen."""

from __future__ import annotations

import torch

from ... import gemm_int8, native
from ...device import architecture
from .plan import GpuCall, screen_refusal


def no_screen(device: torch.device, dtype: torch.dtype) -> str:
    """Why a head of this dtype cannot be screened on this device; empty if it can."""
    if device.type != "cuda":
        return gemm_int8.refusal(device, dtype)
    if native.triton_missing:
        return native.triton_missing
    some = GpuCall(4096, 1024, 4096, dtype, 0.0, hidden_grad=False, head_grad=False)
    return screen_refusal(some._replace(architecture=architecture(device.index)))
