"""8-bit matrix products on a CPU: codes are multiplied exactly, and coded as the specification says."""

import pytest
import torch

from fastalign_kernels import native
from fastalign_kernels.gemm_int8 import (
    LOW,
    Coding,
    code_rows,
    code_rows_ref,
    mm_int8,
    mm_int8_ref,
    plain_coding,
    refusal,
    rotate_ref,
    rotated_coding,
)

needs_int8_gemm = pytest.mark.skipif(
    not native.has_int8_gemm(),
    reason="csrc/int8 needs AVX-512 VNNI, and this CPU has none (or the library is not there)",
)
# Edges of 8 rows, of 48 and 192 columns, and of 4 and 64 along k.
SHAPES = [(1, 1, 1), (3, 17, 5), (8, 48, 64), (9, 49, 63), (30, 700, 130), (130, 193, 577)]


def matrix(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def product(left, right, coding):
    out = torch.full((left.shape[0], right.shape[0] + 3), torch.nan)
    mm_int8(
        code_rows(left, coding, left=True), code_rows(right, coding, left=False), out[:, : right.shape[0]]
    )
    assert out[:, right.shape[0] :].isnan().all()
    return out[:, : right.shape[0]]


def with_basis(coding):
    rows = torch.linalg.qr(matrix(coding.width, LOW, seed=5))[0]
    return coding._replace(basis=rows.t().contiguous())


@needs_int8_gemm
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_factors_give_exact_integers(shape):
    M, N, K = shape
    generator = torch.Generator().manual_seed(M)
    left, right = (
        torch.randint(-128, 128, (rows, K), generator=generator, dtype=torch.int8) for rows in (M, N)
    )
    left[0], right[-1] = -128, -128  # the largest product: 2**14 K
    out = product(left, right, plain_coding(K))
    assert torch.equal(out.long(), left.long() @ right.long().t())


@needs_int8_gemm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_coded_and_multiplied_as_the_specification_says(shape, dtype):
    M, N, K = shape
    left, right = matrix(M, 2 * K).to(dtype)[:, :K], matrix(N, K, seed=1).to(dtype)
    for coding in (plain_coding(K), rotated_coding(K), with_basis(rotated_coding(K))):
        truth = mm_int8_ref(code_rows_ref(left, coding, left=True), code_rows_ref(right, coding, left=False))
        # a number between two codes may be rounded to either: one code of 127 in a row
        allowed = 2 / 127 * left.float().norm(dim=1)[:, None] * right.float().norm(dim=1)
        assert ((product(left, right, coding) - truth).abs() <= allowed + 1e-6).all(), coding.block


@needs_int8_gemm
@pytest.mark.parametrize("H", [16, 64, 100, 576])
def test_a_product_is_off_by_no_more_than_the_bound(H):
    left, right = matrix(60, H), matrix(90, H, seed=1)
    left[:, 0] *= 30
    exact = left.double() @ right.double().t()
    for coding in (rotated_coding(H), with_basis(rotated_coding(H))):
        a, b = code_rows(left, coding, left=True), code_rows(right, coding, left=False)
        out = torch.empty(60, 90)
        mm_int8(a, b, out)
        bound = a.residuals[:, None] * b.lengths + a.lengths[:, None] * b.residuals
        assert ((out - exact).abs() <= bound * 1.001 + 1e-4).all()


@needs_int8_gemm
def test_products_along_the_basis_are_exact():
    coding = with_basis(rotated_coding(128))
    left, right = matrix(20, LOW) @ coding.basis, matrix(50, 128, seed=1)
    right[0] *= 1e4
    out = torch.empty(20, 50)
    plain = coding._replace(block=0)
    mm_int8(code_rows(left, plain, left=True), code_rows(right, plain, left=False), out)
    truth = left.double() @ right.double().t()
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-3)


@needs_int8_gemm
def test_the_rotation_keeps_products_and_is_that_of_the_specification():
    coding = rotated_coding(100)
    x = matrix(40, 100)
    y = rotate_ref(x, coding)
    torch.testing.assert_close(y @ y.t(), x @ x.t())
    eye = torch.eye(coding.width, dtype=torch.int8)
    codes = torch.empty(40, coding.width)
    mm_int8(code_rows(x, coding, left=True), code_rows(eye, plain_coding(coding.width), left=False), codes)
    assert ((codes - y).abs() <= y.abs().amax(1, keepdim=True) * (0.5 / 127 + 1e-5)).all()


@needs_int8_gemm
def test_rows_of_zeros_tiny_numbers_and_nan():
    left = matrix(8, 64)
    left[0], left[1, 3], left[2, 3], left[3] = 0, torch.nan, torch.inf, 1e-40
    out = product(left, matrix(50, 64, seed=1), rotated_coding(64))
    assert (out[[0, 3]] == 0).all() and out[1:3].isnan().all() and out[4:].isfinite().all()


@needs_int8_gemm
def test_the_same_bits_for_any_number_of_threads_and_any_split():
    left, right, coding = matrix(70, 96), matrix(1000, 96, seed=1), with_basis(rotated_coding(96))
    whole = product(left, right, coding)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(product(left, right, coding), whole)
    finally:
        torch.set_num_threads(before)
    parts = [product(part, right, coding) for part in left.split([1, 8, 30, 31])]
    assert torch.equal(torch.cat(parts), whole)


@needs_int8_gemm
def test_refusals_name_the_argument():
    coding = plain_coding(64)
    a = code_rows(matrix(8, 64), coding, left=True)
    with pytest.raises(RuntimeError, match="right: got int32"):
        mm_int8(a, a, torch.empty(8, 48))
    with pytest.raises(RuntimeError, match="block: got 48, expected 0, or a power of two"):
        code_rows(matrix(8, 48), Coding(48, 48), left=True)
    with pytest.raises(RuntimeError, match="width: got 10, expected at least K = 64"):
        code_rows(matrix(8, 64), Coding(10), left=True)
    with pytest.raises(RuntimeError, match="x: got fp64"):
        code_rows(matrix(8, 64).double(), coding, left=True)
    with pytest.raises(RuntimeError, match="x: got int8 with a rotation"):
        code_rows(torch.zeros(8, 64, dtype=torch.int8), rotated_coding(64), left=True)


def test_refusal_says_why_there_is_no_product(monkeypatch):
    assert refusal(torch.device("cuda"), torch.float32).startswith("these 8-bit products are for CPUs")
    assert refusal(torch.device("cpu"), torch.float64) == "factors of torch.float64 have no 8-bit codes"
    monkeypatch.setattr(native, "has_int8_gemm", lambda: False)
    monkeypatch.setattr(native, "missing", "")
    assert refusal(torch.device("cpu"), torch.float32) == "this CPU has no AVX-512 VNNI"
