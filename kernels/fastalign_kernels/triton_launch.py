"""Launching a Triton kernel with less of the host's time than `kernel[grid](...)` takes.

That binds the arguments, derives what Triton specialises on, and compares the globals that the kernel reads:
40 to 100 us of the host for 25 arguments, where the device may work for 20. `launch` keeps the compiled
kernel that it returned, by a key that is at least as fine as Triton's, and launches that. The key holds the
value of each integer, the dtype and alignment of each tensor, and the device of the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Pointers = Sequence[Any]
Numbers = Sequence[int | float]

MOST_KEPT = 8192  # keys of all kernels: token counts differ from batch to batch
_kept: dict[tuple[object, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(
    kernel: Any,
    grid: int | tuple[int, int],
    pointers: Pointers,
    numbers: Numbers,
    **constants: Any,
) -> None:
    """`kernel[grid](*pointers, *numbers, **constants)` on the device of the first pointer.

    Args:
        kernel: of `@triton.jit`, with pointers, numbers and constants in this order among its parameters.
        pointers: tensors, TensorDescriptors and None, but for the first.
        **constants: all of the kernel's; num_warps and num_stages if they are not Triton's defaults.
    """
    first: Any = pointers[0]
    index = getattr(first, "base", first).get_device()
    if index >= 0 and index != torch.cuda.current_device():  # Triton launches on the current device
        with torch.cuda.device(index):
            launch(kernel, grid, pointers, numbers, **constants)
        return
    # The id, since the hash of a kernel is computed from its source each time.
    key = (
        id(kernel),
        index,
        *[_key(pointer) for pointer in pointers],
        *[x if type(x) is int else float for x in numbers],
        *constants,
        *constants.values(),
    )
    kept = _kept.get(key)
    columns, rows = grid if isinstance(grid, tuple) else (grid, 1)
    if kept is not None:
        compiled, last = kept
        compiled[(columns, rows, 1)](*pointers, *numbers, *last)
        return
    # Before the launch, so that a constant that was left out is also seen in Triton's interpreter.
    names = kernel.arg_names[len(pointers) + len(numbers) :]
    last = tuple([constants[name] for name in names])
    compiled = kernel[(columns, rows)](*pointers, *numbers, **constants)
    if compiled is None:
        return  # Triton's interpreter
    if len(_kept) >= MOST_KEPT:
        _kept.clear()
    _kept[key] = compiled, last


def _key(pointer: Any) -> object:
    """What a compiled kernel may depend on of a tensor, None, or a TensorDescriptor."""
    if isinstance(pointer, Tensor):
        return pointer.dtype, pointer.data_ptr() % 16
    if pointer is None:
        return None
    return pointer.base.dtype, *pointer.block_shape
