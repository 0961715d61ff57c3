"""Argument checks shared by the public functions: ValueError with what was seen and what is allowed."""

from __future__ import annotations

import os

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)


def shape(name: str, tensor: Tensor, wanted: tuple[int, ...], letters: str) -> None:
    """`letters` names the wanted dimensions, as "[V, H]"."""
    if tuple(tensor.shape) != wanted:
        raise ValueError(f"{name}: shape {list(tensor.shape)} seen, {letters} = {list(wanted)} wanted")


def dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        raise ValueError(f"{name}: {tensor.dtype} seen, {' or '.join(str(d) for d in allowed)} wanted")


def supported_device(name: str, tensor: Tensor) -> None:
    if tensor.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{name}: on {tensor.device}; a CPU or CUDA tensor wanted")


def device(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name}: on {tensor.device}, but {like_name} is on {like.device}; one device wanted")


def positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name}: {value} seen, a number above 0 wanted")


def unit_interval(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: {value} seen, a number in [0, 1] wanted")


def tail_eps(value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"tail_eps: {value} seen, a probability in (0, 1) wanted, or None for the exact gradient")


def choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: {value!r} seen, one of {', '.join(allowed)} wanted")


def everywhere() -> bool:
    """Whether FASTALIGN_CHECK=1 asks for the checks that wait for the device."""
    return os.environ.get("FASTALIGN_CHECK") == "1"


def ids(name: str, values: Tensor, vocab_size: int, ignore_index: int, check: bool) -> None:
    """Ids in [0, V) or ignore_index. On CUDA reading them back would wait for the device, so only with check or FASTALIGN_CHECK=1."""
    if torch.compiler.is_compiling() or (values.is_cuda and not check and not everywhere()):
        return
    bad = (values != ignore_index) & ((values < 0) | (values >= vocab_size))
    if bad.any():
        where = bad.nonzero()[0].tolist()
        seen = f"{int(values[tuple(where)])} at {where} seen ({int(bad.sum())} such)"
        raise ValueError(f"{name}: {seen}, ids in [0, {vocab_size}) or ignore_index {ignore_index} wanted")
