"""A Triton driver that compiles kernels for an H100 and launches nothing.

With it a machine without a GPU measures what the host does in a call of the Triton path: Triton, our code,
and PyTorch's operations beside the kernels. Results are garbage. What a GPU's host takes for a launch by
CUDA, some 5 to 10 us each, is not in the times.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from fastalign_kernels import autograd, checks

# Which module dispatches a family, and its Triton kernels.
FAMILIES = {
    "policy.ops": "policy.losses_triton",
    "policy.advantages": "policy.advantages_triton",
    "preference.ops": "preference.losses_triton",
}


class HostOnly(DriverBase):
    """A driver that launches nothing; `launches` counts what it was asked for."""

    def __init__(self) -> None:
        self.launches = 0
        self.utils = self
        self.launcher_cls = lambda source, metadata: self._launch

    def _launch(self, *args: Any) -> None:
        self.launches += 1

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self) -> None:
        return None

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        """A module, a function, registers, spills and the most threads, of which Triton checks the last."""
        return 0, 0, 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}


def use_host_only() -> HostOnly:
    """Make the small losses take Triton's kernels on CPU tensors, with the driver above, until the process
    ends. No value of a tensor is read, as on a GPU."""
    active = HostOnly()
    driver.set_active(active)
    for family, triton in FAMILIES.items():
        owner, kernels = (importlib.import_module(f"fastalign_kernels.{name}") for name in (family, triton))
        owner.KERNELS.select = lambda _, kernels=kernels: kernels
    setattr(checks, "readable", lambda *_: False)  # noqa: B010
    setattr(autograd, "_scale", torch._foreach_mul_)  # noqa: B010
    return active
