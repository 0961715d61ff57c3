"""Kernels that take the place of several launches of PyTorch's."""

import pytest
import torch

from fastalign_kernels import logits

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


@pytest.mark.parametrize("ignore_index, same", [(None, True), (-1, True), (5, False), (-(2**31) - 1, False)])
def test_ids_whose_ignored_ones_are_negative_need_no_copy(device, ignore_index, same):
    """A kernel that takes ids as int32 would wrap a mark below -2^31."""
    ids = torch.tensor([[3, -100], [5, -1]], device=device)
    ids[0, 1] = -100 if ignore_index is None else ignore_index
    kept = logits.kept_ids(ids, ignore_index)
    assert (kept.data_ptr() == ids.data_ptr()) == same
    ignored = ids.flatten() == ids[0, 1]
    assert torch.equal(kept < 0, ignored | (ids.flatten() < 0))
    assert torch.equal(kept[~ignored], ids.flatten()[~ignored]) and kept.min() >= -(2**31)
    assert logits.kept_ids(ids[:, 0], ignore_index).is_contiguous()
