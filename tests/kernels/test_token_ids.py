"""Kernels that take the place of several launches of PyTorch's, and launches of what was compiled before."""

import pytest
import torch

from fastalign_kernels import logits
from fastalign_kernels.triton_launch import MOST_KEPT, Launcher

pytest.importorskip("triton", reason="triton is not installed", exc_type=ImportError)
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's: 0 / 0


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("kept", [0, 1, 5000])
def test_one_launch_gives_what_pytorch_gives(device, dtype, kept):
    """NaN for a mean of nothing, as there."""
    from fastalign_kernels import token_ids_triton

    ids = torch.full((5001,), -7, dtype=dtype, device=device)
    ids[:kept] = torch.arange(kept, dtype=dtype, device=device)
    found = token_ids_triton.kept_ids(ids, -7)
    assert torch.equal(found, torch.where(ids.long() == -7, -1, ids.long()))
    expected = logits.loss_scale(found >= 0, "mean", None, None, torch.float32)
    scale = torch.empty_like(expected)
    token_ids_triton.mean_scale(found, scale)
    assert torch.equal(scale.nan_to_num(-1), expected.nan_to_num(-1))


def test_coefficients_in_one_launch_are_those_of_pytorch(device):
    from fastalign_kernels.softmax import coefficients_triton, rows

    grad, stats = torch.randn(2, 7, 1500, generator=torch.Generator().manual_seed(0)).to(device)
    few = slice(0, 1100)
    for given, table in ((grad, stats), (grad[:, few], stats[:, few]), (grad[:, :1].expand(7, 1500), stats)):
        expected = rows.coefficients(given.double(), table.double(), 1000).float()
        found = coefficients_triton.coefficients(given, table, 1000)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


class Compiled:
    def __init__(self, launches):
        self.launches = launches

    def __getitem__(self, grid):
        return lambda *args: self.launches.append((grid, args))


class Kernel:
    """A kernel x, n, A, B whose compiled form notes its launches."""

    arg_names = ("x", "n", "A", "B")

    def __init__(self):
        self.slow, self.launches = 0, []

    def __getitem__(self, grid):
        def launch(x, n, *, A, B, num_warps):
            self.slow += 1
            return Compiled(self.launches)

        return launch


def test_a_compiled_kernel_is_launched_again_only_for_the_same_arguments():
    kernel = Kernel()
    launch = Launcher(kernel)
    x, odd, half = torch.zeros(8), torch.zeros(9)[1:], torch.zeros(8, dtype=torch.float16)
    calls = [(x, 3, 1), (torch.ones(8), 3, 1), (x, 4, 1), (x, 3, 2), (odd, 3, 1), (half, 3, 1), (None, 3, 1)]
    for tensor, n, constant in calls:
        launch(5, (tensor, n), {"B": 7, "A": constant}, {"num_warps": 4})
    assert kernel.slow == 6, "another tensor of the same dtype and alignment compiles nothing"
    ((grid, args),) = kernel.launches
    assert grid == (5, 1, 1) and args[1:] == (3, 1, 7), "constants in the kernel's order"
    for n in range(MOST_KEPT + 100):
        launch(5, (x, n), {"B": 7, "A": 1}, {"num_warps": 4})
    assert len(launch._kept) <= MOST_KEPT
