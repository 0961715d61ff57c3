"""Gradients from logits of a second GEMM, which differ from those of the statistics in the last bit."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastalign_kernels.softmax.columns import ColumnGrad
from fastalign_kernels.softmax.rows import RowInputs, Stat, Transform, coefficients, row_stats_ref
from tests import marks

tile_rows_triton = pytest.importorskip(
    "fastalign_kernels.softmax.tile_rows_triton", reason="triton is not installed", exc_type=ImportError
)

from fastalign_kernels.softmax import columns_triton, rows_triton  # noqa: E402

V = 300
pytestmark = marks.KERNELS
Gradient = Callable[[RowInputs, Tensor, Tensor, Tensor], None]


def _rows(inputs: RowInputs, stats: Tensor, given: Tensor, out: Tensor) -> None:
    rows_triton.row_grad(inputs, stats, given, out)


def _tile(inputs: RowInputs, stats: Tensor, given: Tensor, out: Tensor) -> None:
    softmaxes = tile_rows_triton.Softmaxes(inputs.ids, inputs.bias, inputs.transform, stats, lean=False)
    rows = tile_rows_triton.Rows(None, 0)
    tile_rows_triton.tile_grad(inputs.logits[0], rows, softmaxes, given, out[0])


def _columns(inputs: RowInputs, stats: Tensor, given: Tensor, out: Tensor) -> None:
    totals = torch.empty(2, len(inputs.ids), dtype=torch.float64, device=out.device)
    columns = torch.arange(V, device=out.device)
    columns_triton.column_grad(inputs, ColumnGrad(columns, stats, given, V, out, totals))


@pytest.mark.parametrize("gradient", [_rows, _tile, _columns], ids=["rows", "tile", "columns"])
def test_a_sure_target_has_no_gradient(device: str, gradient: Gradient) -> None:
    """At z = 131 the last bit of fp32 is 2^-16. P - 1 of a token with P = 1 would be that, and not 0."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 4, V, generator=generator)
    ids = torch.tensor([3, 299, 0, 7])
    logits[0, torch.arange(4), ids] = 131.0
    logits, ids, transform = logits.to(device), ids.to(device), Transform()
    stats = row_stats_ref(logits, ids, None, transform)
    assert (stats[Stat.LOGP] == 0).all()
    upstream = torch.zeros(len(Stat), 4, device=device)
    upstream[Stat.LOGP] = torch.tensor([1.0, -1.0, 0.5, -2.0])
    given = coefficients(upstream, stats, V)
    recomputed = torch.nextafter(logits, torch.tensor([1e4, -1e4, 1e4, -1e4], device=device)[:, None])
    out = torch.empty_like(logits)
    gradient(RowInputs(recomputed, ids, None, transform), stats, given, out)
    assert (out.abs() < 1e-30).all()


@pytest.mark.parametrize("gradient", [_rows, _tile, _columns], ids=["rows", "tile", "columns"])
def test_a_row_without_onehot_reads_its_logits_alone(device: str, gradient: Gradient) -> None:
    """Of a sharded head a row whose id another rank has stands under id 0, and LOGP is the other rank's."""
    logits = torch.randn(1, 3, V, generator=torch.Generator().manual_seed(1)).to(device)
    ids = torch.zeros(3, dtype=torch.int64, device=device)
    stats = row_stats_ref(logits, ids, None, Transform())
    given = torch.zeros(4, 3, device=device)
    given[1] = 1.0
    expected = logits.softmax(-1)
    stats[Stat.LOGP] = -1.0
    out = torch.empty_like(logits)
    gradient(RowInputs(logits, ids, None, Transform()), stats, given, out)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-7)
