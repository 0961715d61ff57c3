"""The row kernels against the fp64 specification: native C++, Triton (interpreted without a GPU) and the
reference, on the same inputs."""

import pytest
import torch

from fastalign_kernels import native
from fastalign_kernels.softmax import rows
from fastalign_kernels.softmax.rows import (
    RowInputs,
    Stat,
    Transform,
    accumulator_dtype,
    coefficients,
    row_grad_ref,
    row_stats_ref,
)
from tests import marks
from tests.pairs import triton_in_pairs

rows_triton = pytest.importorskip(
    "fastalign_kernels.softmax.rows_triton", reason="triton is not installed", exc_type=ImportError
)

DEVICES = {"native": "cpu", "reference": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}
TRANSFORMS = {"plain": Transform(), "softcap": Transform(1.0, 5.0, 1.0), "all": Transform(0.7, 30.0, 1.3)}
pytestmark = marks.KERNELS


def run_stats(implementation, logits, ids, bias, transform):
    stats = torch.empty(len(Stat), ids.numel(), dtype=accumulator_dtype(logits.dtype), device=logits.device)
    kernels = {"native": rows.KERNELS.native, "triton": rows_triton, "reference": rows.KERNELS.reference}[
        implementation
    ]
    kernels.row_stats(RowInputs(logits, ids, bias, transform), stats)
    return stats


def run_grad(implementation, logits, ids, bias, transform, stats, coefficients, out):
    kernels = {"native": rows.KERNELS.native, "triton": rows_triton, "reference": rows.KERNELS.reference}[
        implementation
    ]
    kernels.row_grad(RowInputs(logits, ids, bias, transform), stats, coefficients, out)


@pytest.fixture(params=["native", "triton", "reference"])
def implementation(request):
    if request.param == "native" and native.missing:
        pytest.skip(f"the native library is not there: {native.missing}")
    return request.param


def make(dtype, V, scale, device, seed=0):
    """[2, 3, V] logits with a time stride, peaked (large scale) or flat; the ignored row holds NaN, which
    nobody may read."""
    generator = torch.Generator().manual_seed(seed)
    storage = torch.randn(2, 4, V, generator=generator, dtype=torch.float64) * scale
    ids = torch.randint(0, V, (6,), generator=generator)
    ids[0], ids[1], ids[4] = 0, V - 1, -1
    storage[0, 2, ids[2]] += 3 * scale  # a confident, right prediction
    logits = storage.to(dtype)
    logits[1, 1] = float("nan")
    bias = torch.randn(V, generator=generator, dtype=torch.float64).to(dtype)
    return logits.to(device)[:, :3], ids.to(device), bias.to(device)


@pytest.mark.parametrize(
    "implementation, dtype, shape, transform",
    triton_in_pairs(
        [torch.float32, torch.bfloat16, torch.float16, torch.float64],
        [(123, 1.0), (2048, 8.0), (5003, 0.01), (2049, 1e4)],
        list(TRANSFORMS),
    ),
    indirect=["implementation"],
    ids=str,
)
def test_statistics_and_gradient(no_worse_than_eager, implementation, dtype, shape, transform):
    V, scale = shape
    if dtype == torch.float16 and scale == 1e4:
        scale = 1e3  # 4e4 is near fp16's largest number
    device = DEVICES[implementation]
    logits, ids, bias = make(dtype, V, scale, device)
    with_bias = bias if transform == "all" else None
    t = TRANSFORMS[transform]

    def as_truth(x):
        return None if x is None else x.double()

    truth = row_stats_ref(logits.double(), ids, as_truth(with_bias), t)
    eager = row_stats_ref(logits, ids, with_bias, t)
    stats = run_stats(implementation, logits, ids, with_bias, t)
    no_worse_than_eager(stats[: Stat.TOP1], eager[: Stat.TOP1], truth[: Stat.TOP1], "statistics")
    assert torch.equal(stats[Stat.TOP1] > 0, truth[Stat.TOP1] > 0)
    assert (stats[:, 4] == 0).all(), "an ignored row has statistics"

    upstream = torch.randn(len(Stat), 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(
        device
    )
    c_truth = coefficients(upstream, truth, V)
    c = c_truth.to(stats.dtype)
    grad_truth = row_grad_ref(logits.double(), ids, as_truth(with_bias), t, truth, c_truth)
    grad_eager = row_grad_ref(logits, ids, with_bias, t, eager, c).to(dtype)
    # Triton's interpreter truncates fp32 to bf16 where hardware rounds to nearest, so there the kernel stores
    # fp32 and torch rounds.
    truncates = implementation == "triton" and device == "cpu" and dtype == torch.bfloat16
    out = torch.empty(2, 3, V, dtype=torch.float32 if truncates else dtype, device=device)
    run_grad(implementation, logits, ids, with_bias, t, stats, c, out)
    no_worse_than_eager(out.to(dtype), grad_eager, grad_truth, "gradient")
    assert (out[1, 1] == 0).all(), "an ignored row has a gradient"

    if not truncates:
        in_place = logits.clone()
        run_grad(implementation, in_place, ids, with_bias, t, stats, c, in_place)
        assert torch.equal(in_place, out), "in place differs from out of place"


def test_the_gradient_formula_is_autograds():
    """row_grad_ref with `coefficients` is the derivative of row_stats_ref, in fp64, for every differentiable
    statistic."""
    for t in TRANSFORMS.values():
        logits, ids, bias = make(torch.float64, 37, 2.0, "cpu")
        logits = torch.nan_to_num(logits).requires_grad_()
        stats = row_stats_ref(logits, ids, bias, t)
        upstream = torch.randn(len(Stat), 6, dtype=torch.float64)
        upstream[Stat.MAX :] = 0
        (expected,) = torch.autograd.grad(stats, logits, upstream)
        found = row_grad_ref(
            logits.detach(), ids, bias, t, stats.detach(), coefficients(upstream, stats.detach(), 37)
        )
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_slope_of_a_saturated_softcap_keeps_its_digits(implementation, dtype):
    """1 - tanh^2 = 1 / cosh^2 to its last digits where tanh is 1 but for its last ones, and zero beyond."""
    softcap, V, device = 5.0, 4000, DEVICES[implementation]
    logits = torch.linspace(-60, 60, V, dtype=dtype)[None, None].to(device)
    stats = torch.zeros(len(Stat), 1, dtype=dtype, device=device)
    coefficient = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=dtype, device=device)[
        :, None
    ]  # the gradient is then the slope
    out = torch.empty_like(logits)
    run_grad(
        implementation,
        logits,
        torch.tensor([7], device=device),
        None,
        Transform(1.0, softcap, 1.0),
        stats,
        coefficient,
        out,
    )
    x = logits[0, 0].cpu().double() / softcap
    truth = x.cosh() ** -2
    eps = torch.finfo(dtype).eps
    allowed = truth * eps * (8 + 4 * x.abs())  # a rounding of x is |x| eps of e^x
    assert ((out[0, 0].cpu().double() - truth).abs() <= allowed).all()


def test_masked_and_broken_rows(implementation):
    """-inf is a masked token; NaN and +inf make a row NaN, as log_softmax has it; a row of one live logit is
    certain."""
    inf = float("inf")
    V, device = 4100, DEVICES[implementation]
    logits = torch.randn(1, 6, V)
    logits[0, 0, :4000] = -inf
    logits[0, 1, 7] = float("nan")
    logits[0, 2, 9] = inf
    logits[0, 3] = -inf
    logits[0, 3, 11] = 2.5
    logits[0, 4, 20:30] = -inf  # id 25 is masked
    logits[0, 5] = -inf
    ids = torch.tensor([4050, 3, 9, 11, 25, 0])
    logits, ids = logits.to(device), ids.to(device)
    stats = run_stats(implementation, logits, ids, None, Transform())
    expected = torch.log_softmax(logits.double(), -1)[0].gather(-1, ids[:, None])[:, 0]
    torch.testing.assert_close(stats[Stat.LOGP].double(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert stats[Stat.ENTROPY, 3] == 0 and stats[Stat.TOP1, 3] == 1 and stats[Stat.LOGP, 3] == 0
    assert stats[Stat.ENTROPY, :5].isfinite().tolist() == [True, False, False, True, True]
    grad = torch.empty(1, 6, V, device=device)
    coefficient = torch.tensor([1.0, -1.0, 0.5, 0.0])[:, None].repeat(1, 6).to(device)
    run_grad(implementation, logits, ids, None, Transform(), stats, coefficient, grad)
    assert (grad[0, 0, :4000] == 0).all() and grad[0, 0, 4000:].abs().sum() > 0
    assert (grad[0, 3] == 0).all()


def test_numbers_beyond_32_bits():
    """Row offsets are 64-bit: 2^31 logits apart, by a time stride into memory that mostly does not exist."""
    if native.missing:
        pytest.skip(f"the native library is not there: {native.missing}")
    V = 2**16
    storage = torch.zeros(
        2**31 // 2**16 + 2, V, dtype=torch.bfloat16
    )  # 4.3 GB of zero pages, of which two rows are touched
    storage[-1] = torch.arange(V) % 7
    logits = storage[:: 2**31 // 2**16 + 1][None]
    assert logits.stride(1) > 2**31
    ids = torch.tensor([0, 6])
    stats = rows.row_stats(logits, ids, None, Transform())
    expected = row_stats_ref(logits, ids, None, Transform())
    torch.testing.assert_close(stats, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(bool(native.missing), reason=f"the native library is not there: {native.missing}")
def test_every_element_type_rounds_to_nearest_even():
    """The integer conversions of csrc/common/dtypes.h against torch's.

    Over every 16-bit pattern and fp32 values between two of them.
    """
    for dtype in (torch.bfloat16, torch.float16):
        patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
        finite = patterns[patterns.isfinite()].float()
        # gradient = uniform * slope with P = 0: a row of -inf but for the id passes `uniform` through load,
        # arithmetic and store.
        values = torch.cat(
            [finite, finite * (1 + 2**-9), torch.nextafter(finite, torch.tensor(float("inf")))]
        )
        values = values[values.abs() < torch.finfo(dtype).max]
        N = values.numel()
        logits = torch.full((1, N, 2), -float("inf"), dtype=dtype)
        logits[..., 1] = 0
        ids = torch.ones(N, dtype=torch.int64)
        stats = rows.row_stats(logits, ids, None, Transform())
        coefficient = torch.zeros(4, N)
        coefficient[3] = values
        out = torch.empty_like(logits)
        rows.row_grad(logits, ids, None, Transform(), stats, coefficient, out)
        assert torch.equal(out[0, :, 0], values.to(dtype)), dtype
        # and loading: the logit itself comes back as the row's maximum
        loaded = rows.row_stats(
            finite.to(dtype)[None, :, None], torch.zeros(finite.numel(), dtype=torch.int64), None, Transform()
        )
        assert torch.equal(loaded[Stat.MAX], finite), dtype
