"""What kernels ask of a CUDA device."""

from __future__ import annotations

import functools

import torch

from .torch_func import assumed_constant


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
        return 2  # the programs of Triton's interpreter run one after another
    return torch.cuda.get_device_properties(device).multi_processor_count
