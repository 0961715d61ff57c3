"""Launching a Triton kernel again, with less of the host's time than `kernel[grid](...)` takes.

That binds the arguments, derives what Triton specialises on, and compares the globals that the kernel reads:
40 to 100 us of the host for 25 arguments, where the device may work for 20. `Launcher` keeps the compiled
kernel that it returned, by a key that is at least as fine as Triton's own, and launches that. The key holds
an int's value and a tensor's dtype, alignment and device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

MOST_KEPT = 1024  # keys of a kernel: token counts differ from batch to batch


class Launcher:
    """Launches of one kernel. The constants must come last among its parameters."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._kept: dict[tuple[object, ...], tuple[Any, tuple[Any, ...]]] = {}

    def __call__(
        self, grid: int, args: Sequence[Any], constants: dict[str, Any], options: dict[str, int] | None = None
    ) -> None:
        """`kernel[(grid,)](*args, **constants, **options)` on the current device.

        options: num_warps and num_stages.
        """
        options = options or {}
        key = tuple(
            [
                argument
                if type(argument) is int
                else (argument.dtype, argument.data_ptr() % 16, argument.get_device())
                if isinstance(argument, Tensor)
                else _key(argument)
                for argument in args
            ]
            + [*constants.values(), *options.values()]
        )
        kept = self._kept.get(key)
        if kept is not None:
            compiled, last = kept
            compiled[(grid, 1, 1)](*args, *last)
            return
        compiled = self.kernel[(grid,)](*args, **constants, **options)
        if compiled is None:
            return  # Triton's interpreter
        if len(self._kept) >= MOST_KEPT:
            self._kept.clear()
        names = self.kernel.arg_names[len(args) :]
        self._kept[key] = compiled, tuple(constants[name] for name in names)


def _key(argument: Any) -> object:
    """What a compiled kernel may depend on of a float, None, or a TensorDescriptor."""
    if argument is None or type(argument) is float:
        return type(argument)
    return argument.base.dtype, *argument.block_shape
