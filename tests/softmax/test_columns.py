"""Column sums against the fp64 specification: native C++, Triton (interpreted without a GPU) and the
reference, on the same inputs."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign_kernels import native
from fastalign_kernels.softmax import columns
from fastalign_kernels.softmax.columns import ColumnGrad, ColumnSums, column_sums_ref
from fastalign_kernels.softmax.rows import (
    Coefficient,
    RowInputs,
    Transform,
    accumulator_dtype,
    row_grad_ref,
    row_stats_ref,
)
from tests import marks
from tests.pairs import triton_in_pairs

columns_triton = pytest.importorskip(
    "fastalign_kernels.softmax.columns_triton", reason="triton is not installed", exc_type=ImportError
)

TRANSFORMS = {"plain": Transform(), "softcap": Transform(1.0, 5.0, 1.0), "all": Transform(0.7, 30.0, 1.3)}
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
pytestmark = marks.KERNELS


@pytest.fixture(params=["native", "triton", "reference"])
def implementation(request: pytest.FixtureRequest) -> Any:
    if request.param == "native" and native.missing:
        pytest.skip(f"the native library is not there: {native.missing}")
    return {
        "native": columns.KERNELS.native,
        "triton": columns_triton,
        "reference": columns.KERNELS.reference,
    }[request.param]


def run(
    implementation: Any, logits: Tensor, ids: Tensor, bias: Tensor | None, transform: Transform, stats: Tensor
) -> ColumnSums:
    N, V = logits.shape
    out = ColumnSums(
        torch.empty(V, dtype=stats.dtype),
        torch.empty(V, dtype=stats.dtype),
        torch.empty(2, N, dtype=torch.float64),
    )
    if implementation is columns_triton and torch.cuda.is_available():
        moved = ColumnSums(*(x.cuda() for x in out))
        gpu_bias = None if bias is None else bias.cuda()
        inputs = RowInputs(logits[None].cuda(), ids.cuda(), gpu_bias, transform)
        implementation.column_sums(inputs, stats.cuda(), moved)
        return ColumnSums(*(x.cpu() for x in moved))
    implementation.column_sums(RowInputs(logits[None], ids, bias, transform), stats, out)
    return out


@pytest.mark.parametrize(
    "implementation, dtype, shape, transform",
    triton_in_pairs(DTYPES, [(123, 1.0), (1024, 8.0), (2051, 0.01), (2049, 1e4)], list(TRANSFORMS)),
    indirect=["implementation"],
    ids=str,
)
def test_sums(
    no_worse_than_eager: Any,
    implementation: Any,
    dtype: torch.dtype,
    shape: tuple[int, float],
    transform: str,
) -> None:
    """[83, V] with a row stride; the ignored row holds NaN, which nobody may read."""
    V, scale = shape
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(83, V + 5, generator=generator, dtype=torch.float64) * scale).to(dtype)[:, :V]
    ids = torch.randint(0, V, (83,), generator=generator)
    ids[[2, 82]] = -1
    logits[2] = float("nan")
    bias = torch.randn(V, generator=generator, dtype=torch.float64).to(dtype) if transform == "all" else None
    t = TRANSFORMS[transform]
    wide = (logits.double(), ids, None if bias is None else bias.double(), t)
    truth_stats = row_stats_ref(*wide)
    # One table for all: errors of the statistics are tested in test_rows.py.
    stats = truth_stats.to(accumulator_dtype(dtype))
    truth = column_sums_ref(*wide, stats.double())
    eager = column_sums_ref(logits, ids, bias, t, stats)
    found = run(implementation, logits, ids, bias, t, stats)
    for name in ColumnSums._fields:
        no_worse_than_eager(getattr(found, name), getattr(eager, name), getattr(truth, name), name)
    assert (found.totals[:, [2, 82]] == 0).all()


def run_grad(implementation: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
    """arguments: logits, columns, ids, bias, transform, stats, coefficients, V."""
    logits, columns, ids, bias, transform, stats, coefficients, V = arguments
    device = "cuda" if implementation is columns_triton and torch.cuda.is_available() else "cpu"
    gpu_bias = None if bias is None else bias.to(device)
    inputs = RowInputs(logits[None].to(device), ids.to(device), gpu_bias, transform)
    # Triton's interpreter truncates fp32 to bf16 where hardware rounds to nearest, so there the kernel stores
    # fp32 and torch rounds.
    truncates = implementation is columns_triton and device == "cpu" and logits.dtype == torch.bfloat16
    dtype = torch.float32 if truncates else logits.dtype
    out = torch.empty(1, logits.shape[0], columns.numel(), dtype=dtype, device=device)
    totals = torch.empty(2, logits.shape[0], dtype=torch.float64, device=device)
    given = columns.to(device), stats.to(device), coefficients.to(device), V, out, totals
    implementation.column_grad(inputs, ColumnGrad(*given))
    return out[0].cpu().to(logits.dtype), totals.cpu()


@pytest.mark.parametrize(
    "implementation, dtype, shape, transform, given_columns",
    triton_in_pairs(
        DTYPES,
        [(123, 1, 1.0), (2051, 1040, 8.0), (5000, 2049, 0.01), (2049, 700, 1e4)],
        list(TRANSFORMS),
        ["all", "gathered"],
    ),
    indirect=["implementation"],
    ids=str,
)
def test_gradient(
    no_worse_than_eager: Any,
    implementation: Any,
    dtype: torch.dtype,
    shape: tuple[int, int, float],
    transform: str,
    given_columns: str,
) -> None:
    """K columns of row_grad's, without its uniform part, and the totals over them; ids inside and outside of
    them, one row ignored."""
    V, K, scale = shape
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(19, V + 5, generator=generator, dtype=torch.float64) * scale).to(dtype)[:, :V]
    kept = torch.randperm(V, generator=generator)[:K].sort()[0]
    ids = torch.randint(0, V, (19,), generator=generator)
    ids[:5] = kept[torch.randint(0, K, (5,), generator=generator)]
    ids[4] = kept[-1]
    ids[7] = -1
    logits[7] = float("nan")
    bias = torch.randn(V, generator=generator, dtype=torch.float64).to(dtype) if transform == "all" else None
    t = TRANSFORMS[transform]
    coefficients = torch.randn(4, 19, generator=generator, dtype=torch.float64).to(accumulator_dtype(dtype))
    coefficients[Coefficient.UNIFORM] = 0
    wide_bias = None if bias is None else bias.double()
    truth_stats = row_stats_ref(logits.double(), ids, wide_bias, t)
    stats = truth_stats.to(accumulator_dtype(dtype))
    truth = row_grad_ref(logits[None].double(), ids, wide_bias, t, stats.double(), coefficients.double())[0][
        :, kept
    ]
    _, truth_totals = run_grad(
        columns.KERNELS.reference,
        logits.double(),
        kept,
        ids,
        wide_bias,
        t,
        stats.double(),
        coefficients.double(),
        V,
    )
    given = logits[:, kept] if given_columns == "gathered" else logits
    eager, eager_totals = run_grad(
        columns.KERNELS.reference, given, kept, ids, bias, t, stats, coefficients, V
    )
    found, totals = run_grad(implementation, given, kept, ids, bias, t, stats, coefficients, V)
    no_worse_than_eager(found, eager, truth, "gradient")
    no_worse_than_eager(totals, eager_totals, truth_totals, "totals")
    assert (found[7] == 0).all() and (totals[:, 7] == 0).all()


def test_columns_that_do_not_ascend_are_refused() -> None:
    if native.missing:
        pytest.skip(f"the native library is not there: {native.missing}")
    logits, ids = torch.randn(2, 9), torch.tensor([0, 1])
    stats = row_stats_ref(logits, ids, None, Transform())
    for wrong in ([3, 3], [4, 2], [2, 9], [-1, 2]):
        with pytest.raises(RuntimeError, match="columns: got .*, expected ascending columns below 9"):
            run_grad(
                columns.KERNELS.native,
                logits,
                torch.tensor(wrong),
                ids,
                None,
                Transform(),
                stats,
                torch.zeros(4, 2),
                9,
            )


def test_threads_change_no_bit() -> None:
    if native.missing:
        pytest.skip(f"the native library is not there: {native.missing}")
    logits, ids = torch.randn(33, 5000, generator=torch.Generator().manual_seed(0)), torch.arange(33)
    stats = row_stats_ref(logits, ids, None, Transform())
    one = run(columns.KERNELS.native, logits, ids, None, Transform(), stats)
    torch.set_num_threads(3)
    try:
        three = run(columns.KERNELS.native, logits, ids, None, Transform(), stats)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, three))


def test_opcheck() -> None:
    if native.missing:
        pytest.skip(f"the native library is not there: {native.missing}")
    logits, ids = torch.randn(1, 6, 40), torch.arange(6)
    stats = row_stats_ref(logits, ids, None, Transform())
    out = (torch.empty(40), torch.empty(40), torch.empty(2, 6, dtype=torch.float64))
    torch.library.opcheck(
        torch.ops.fastalign.column_sums.default, (logits, ids, None, *Transform(), stats, *out)
    )
    grad_out = (torch.empty(1, 6, 3), torch.empty(2, 6, dtype=torch.float64))
    kept = torch.tensor([1, 5, 39])
    torch.library.opcheck(
        torch.ops.fastalign.column_grad.default,
        (logits, kept, ids, None, *Transform(), stats, torch.ones(4, 6), 40, *grad_out),
    )
