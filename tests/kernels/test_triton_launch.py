"""Launches of a kernel that was compiled before."""

import pytest
import torch

from fastalign_kernels import triton_launch
from fastalign_kernels.triton_launch import launch


class Compiled:
    """What Triton returns from a launch on a GPU; it notes its launches."""

    def __init__(self, launches):
        self.launches = launches

    def __getitem__(self, grid):
        return lambda *args: self.launches.append((grid, args))


class Kernel:
    """A kernel x, n, f, A, B."""

    arg_names = ("x", "n", "f", "A", "B")

    def __init__(self):
        self.compiled, self.launches = 0, []

    def __getitem__(self, grid):
        def launch(x, n, f, *, A, B, num_warps):
            self.compiled += 1
            return Compiled(self.launches)

        return launch


@pytest.fixture
def kept(monkeypatch):
    monkeypatch.setattr(triton_launch, "_kept", {})
    return triton_launch._kept


def test_a_compiled_kernel_is_launched_again_only_for_the_same_arguments(kept):
    kernel, other = Kernel(), Kernel()
    x, odd, half = torch.zeros(8), torch.zeros(9)[1:], torch.zeros(8, dtype=torch.float16)
    launch(kernel, 5, (x,), (3, 0.5), A=1, B=7, num_warps=4)
    launch(kernel, 5, (torch.ones(8),), (3, 0.25), B=7, A=1, num_warps=4)
    assert kernel.compiled == 2, "constants in another order are another key, and no other constants"
    launch(kernel, (5, 2), (torch.ones(8),), (3, 0.25), A=1, B=7, num_warps=4)
    assert kernel.compiled == 2, "another tensor of the same dtype and alignment compiles nothing"
    ((grid, args),) = kernel.launches
    assert grid == (5, 2, 1) and args[1:] == (3, 0.25, 1, 7), "constants in the kernel's order"
    for pointers, numbers, A, num_warps in [
        ((odd,), (3, 0.5), 1, 4),
        ((half,), (3, 0.5), 1, 4),
        ((x,), (4, 0.5), 1, 4),
        ((x,), (3, 1), 1, 4),
        ((x,), (3, 0.5), 2, 4),
        ((x,), (3, 0.5), 1, 8),
    ]:
        before = kernel.compiled
        launch(kernel, 5, pointers, numbers, A=A, B=7, num_warps=num_warps)
        assert kernel.compiled == before + 1
    launch(other, 5, (x,), (3, 0.5), A=1, B=7, num_warps=4)
    assert other.compiled == 1


def test_few_are_kept(kept, monkeypatch):
    monkeypatch.setattr(triton_launch, "MOST_KEPT", 10)
    kernel, x = Kernel(), torch.zeros(8)
    for n in range(25):
        launch(kernel, 5, (x,), (n, 0.5), A=1, B=7, num_warps=4)
    assert len(kept) <= 10 and kernel.compiled == 25


def test_a_constant_that_was_left_out_is_an_error_before_the_launch(kept):
    """Triton would take the parameter's default, and the next launch would have nothing in its place."""
    kernel = Kernel()
    with pytest.raises(KeyError, match="B"):
        launch(kernel, 5, (torch.zeros(8),), (3, 0.5), A=1, num_warps=4)
    assert kernel.compiled == 0
