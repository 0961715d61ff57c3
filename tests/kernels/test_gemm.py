"""Our matrix products on a CPU against fp64: shapes with edges, orders in memory, dtypes, gathered and
scattered rows."""

import pytest
import torch

from fastalign_kernels import native
from fastalign_kernels.gemm import mm, uses_native_gemm

pytestmark = pytest.mark.usefixtures("forced_gemm")
needs_native_gemm = pytest.mark.skipif(
    not native.has_gemm(),
    reason="csrc/gemm needs AVX-512, and this CPU has none (or the library is not there)",
)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Threads share out the columns, the rows, and k (the last three); edges of 1 to 8 rows, 1 to 48 columns, odd
# numbers of k.
SHAPES = [
    (1, 1, 1),
    (3, 17, 5),
    (8, 48, 16),
    (9, 49, 33),
    (30, 700, 129),
    (700, 30, 641),
    (16, 577, 1301),
    (30, 20, 2001),
    (57, 90, 5003),
]
DTYPES = [(F32, F32), (BF16, BF16), (F32, BF16), (BF16, F32), (F16, F16), (F32, F16)]


def matrix(rows, columns, dtype, order, generator):
    x = torch.randn(rows, columns, generator=generator).to(dtype)
    return x.t().contiguous().t() if order == "columns" else x


@needs_native_gemm
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "orders",
    [("rows", "rows"), ("rows", "columns"), ("columns", "rows"), ("columns", "columns")],
    ids="-".join,
)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_products_match_fp64(orders, dtypes, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for M, N, K in SHAPES:
            generator = torch.Generator().manual_seed(M)
            left, right = (
                matrix(M, K, dtypes[0], orders[0], generator),
                matrix(K, N, dtypes[1], orders[1], generator),
            )
            rounded = (
                BF16 in dtypes and torch.cpu._is_avx512_bf16_supported()
            )  # both factors enter in bf16 then
            a, b = (x.bfloat16().double() if rounded else x.double() for x in (left, right))
            truth = a @ b
            allowed = 4e-7 * (a.abs() @ b.abs())
            out = torch.full((M, N + 3), torch.nan)
            torch.ops.fastalign.gemm(left, right, out[:, :N], False, None, None)
            assert ((out[:, :N].double() - truth).abs() <= allowed).all() and out[:, N:].isnan().all(), (
                M,
                N,
                K,
            )
            torch.ops.fastalign.gemm(left, right, out[:, :N], True, None, None)
            assert ((out[:, :N].double() - 2 * truth).abs() <= 2 * allowed).all(), (M, N, K)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "dtypes", [(F32, F32), (BF16, BF16), (F32, F16), (torch.float64, torch.float64)], ids=str
)
@pytest.mark.parametrize("add", [False, True])
def test_rows_are_gathered_and_scattered(dtypes, add):
    """With torch's GEMMs (fp64) as with ours; rows that are not named are not touched."""
    if dtypes[1] != torch.float64 and not native.uses_gemm():
        pytest.skip("mixed and low-precision products on a CPU are csrc/gemm's, which needs AVX-512")
    for M, N, K in SHAPES:
        generator = torch.Generator().manual_seed(K)
        left, right = (
            matrix(M, K, dtypes[0], "rows", generator),
            matrix(K + 9, N, dtypes[1], "rows", generator),
        )
        right_rows = torch.randperm(K + 9, generator=generator)[:K]
        out_rows = torch.randperm(M + 5, generator=generator)[:M]
        wide = BF16 if BF16 in dtypes and torch.cpu._is_avx512_bf16_supported() else torch.float64
        product = left.to(wide).double() @ right[right_rows].to(wide).double()
        out = torch.randn(
            M + 5, N, generator=generator, dtype=torch.float64 if torch.float64 in dtypes else F32
        )
        before = out.clone()
        truth = out.double().clone()
        truth[out_rows] = product + truth[out_rows] if add else product
        mm(left, right, out, add=add, right_rows=right_rows, out_rows=out_rows)
        torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5 * K**0.5)
        untouched = torch.ones(M + 5, dtype=torch.bool).index_fill(0, out_rows, False)
        assert torch.equal(out[untouched], before[untouched])


@needs_native_gemm
def test_sums_of_many_terms_stay_as_exact_as_torchs():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(64, 20000, generator=generator), torch.randn(20000, 64, generator=generator)
    truth = left.double() @ right.double()
    out = torch.empty(64, 64)
    mm(left, right, out)
    assert (out - truth).norm() <= 1.5 * (left @ right - truth).norm()


@needs_native_gemm
def test_what_a_product_is_of_reaches_only_its_own_elements():
    """Panels are filled up with zeros, and NaN times zero is NaN: a NaN must stay in its row or column."""
    left, right = torch.ones(9, 33), torch.ones(33, 49)
    left[3, 2] = right[5, 7] = torch.nan
    out = torch.empty(9, 49)
    mm(left, right, out)
    expected = torch.zeros(9, 49, dtype=torch.bool)
    expected[3] = expected[:, 7] = True
    assert torch.equal(out.isnan(), expected) and (out[~expected] == 33).all()


@pytest.mark.parametrize("rows", [0, 1, 2, 9])
@pytest.mark.parametrize("columns", [0, 1, 2, 49])
@pytest.mark.parametrize("k", [0, 1, 2, 33])
def test_no_size_and_no_strides_are_refused(rows, columns, k):
    """Every other row or column of a larger matrix, and sizes of 0 and 1, whose strides mean nothing."""
    generator = torch.Generator().manual_seed(0)
    lefts, rights = ([torch.randn(2 * m, 2 * n, generator=generator)] for m, n in ((rows, k), (k, columns)))
    for factors, (m, n) in ((lefts, (rows, k)), (rights, (k, columns))):
        whole = factors.pop()
        factors += [whole[::2, ::2], whole[::2, :n], whole[:m, ::2], whole[:m, ::2].t().contiguous().t()]
    for left in lefts:
        for right in rights:
            out = torch.ones(rows, columns)
            mm(left, right, out, add=True)
            torch.testing.assert_close(out, 1 + left @ right, rtol=1e-5, atol=1e-5)


def test_rows_are_gathered_from_a_matrix_in_the_order_of_columns():
    right, places = torch.randn(9, 40).t().contiguous().t(), torch.tensor([3, 0, 7])
    left, out = torch.randn(5, 3), torch.zeros(5, 40)
    mm(left, right, out, right_rows=places)
    torch.testing.assert_close(out, left @ right[places], rtol=1e-5, atol=1e-5)


@needs_native_gemm
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_sums_have_the_same_bits_with_any_number_of_threads(dtypes):
    before = torch.get_num_threads()
    try:
        for M, N, K in (*SHAPES, (1, 3, 9001), (400, 410, 3000)):
            generator = torch.Generator().manual_seed(M)
            left, right = (
                matrix(M, K, dtypes[0], "rows", generator),
                matrix(K, N, dtypes[1], "rows", generator),
            )
            found = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(torch.zeros(M, N))
                torch.ops.fastalign.gemm(left, right, found[-1], False, None, None)
            assert all(torch.equal(found[0], other) for other in found[1:]), (M, N, K)
    finally:
        torch.set_num_threads(before)


@needs_native_gemm
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 1, 5), (1, 5, 1), (5, 1, 1), (9, 1, 20), (1, 50, 20), (9, 50, 1)], ids=str
)
def test_strides_of_sizes_of_one_are_any_number(shape):
    M, N, K = shape

    def laid_out(rows, columns):
        x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
        return x.as_strided(
            x.shape, [2 if size == 1 else stride for size, stride in zip(x.shape, x.stride())]
        )

    left, right, out = laid_out(M, K), laid_out(K, N), torch.empty(M, N)
    for a, b in ((left, right), (laid_out(K, M).t(), laid_out(N, K).t())):
        torch.ops.fastalign.gemm(a, b, out, False, None, None)
        torch.testing.assert_close(out, a @ b, rtol=1e-5, atol=1e-5)


@needs_native_gemm
def test_bad_arguments_are_refused_by_name():
    gemm, x = torch.ops.fastalign.gemm, torch.ones(4, 4)
    for arguments, message in (
        ((x, x[:3], x, False, None, None), r"right: got fp32 \[3, 4\], expected \[K, N\] with K = 4"),
        ((x, x, x[:, :3], False, None, None), r"out: got fp32 \[4, 3\] with strides \[4, 1\], expected fp32"),
        ((x, x, x.double(), False, None, None), r"out: got fp64 \[4, 4\], expected fp32"),
        ((x.double(), x, x, False, None, None), r"left: got fp64 \[4, 4\], expected fp32, bf16 or fp16"),
        ((torch.ones(8, 8)[::2, ::2], x, x, False, None, None), "left: got .*, expected unit stride"),
        ((x, x.t(), x.clone(), False, torch.arange(4), None), "right: got .*, expected unit stride"),
        ((x, x, x, False, torch.arange(3), None), r"right_rows: got int64 \[3\], expected \[K\] = \[4\]"),
        (
            (x, x, x, False, torch.tensor([0, 1, 2, 4]), None),
            r"right_rows: got 4 at 3, expected rows in \[0, 4\)",
        ),
        ((x, x, x, False, None, torch.tensor([0, 1, 2, -1])), "out_rows: got -1 at 3, expected rows in"),
    ):
        with pytest.raises(RuntimeError, match=message):
            gemm(*arguments)


def test_who_multiplies():
    cpu = torch.device("cpu")
    assert uses_native_gemm(cpu, F32) == uses_native_gemm(cpu, BF16) == native.uses_gemm()
    assert not uses_native_gemm(cpu, torch.float64) and not uses_native_gemm(torch.device("cuda"), F32)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_torchs_products_widen_the_factors(dtypes, monkeypatch):
    """As GPU engines ask on a CPU whose GEMMs are torch's, which have no bf16 to fp32."""
    monkeypatch.setattr(native, "uses_gemm", lambda: False)
    generator = torch.Generator().manual_seed(0)
    left, right = matrix(5, 9, dtypes[0], "rows", generator), matrix(9, 7, dtypes[1], "columns", generator)
    out = torch.full((5, 7), torch.nan)
    mm(left, right, out)
    torch.testing.assert_close(out, left.float() @ right.float())
    mm(left, right, out, add=True)
    torch.testing.assert_close(out, 2 * (left.float() @ right.float()))
