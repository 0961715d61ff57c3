"""The head without logits: values and gradients of every mode."""

import pytest
import torch
import torch.nn.functional as F

from fastalign_kernels import (
    linear_cross_entropy,
    linear_cross_entropy_stats,
    linear_logprobs,
    linear_token_stats,
    native,
)
from fastalign_kernels.linear import chunks
from fastalign_kernels.linear.plan import TileCall, token_chunk
from fastalign_kernels.linear.reference import linear_cross_entropy_ref, linear_token_stats_ref
from tests.linear.inputs import grads_of, make

OPTIONS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 5.0},
    "logit_scale": {"logit_scale": 0.3},
    "temperature": {"temperature": 0.6},
    "num_items": {"num_items": 3.0},
    "all": {
        "label_smoothing": 0.2,
        "z_loss": 1e-2,
        "softcap": 5.0,
        "logit_scale": 0.7,
        "temperature": 1.4,
        "num_items": torch.tensor(5),
    },
}


HEAD_OPTIONS = {"none": {}, "all": {"softcap": 5.0, "logit_scale": 0.7, "temperature": 1.4}}


SEVERAL_CHUNKS = 0.01  # MiB: 5 to 10 tokens at V = 123


pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("workspace_mib", [None, SEVERAL_CHUNKS], ids=["one chunk", "several chunks"])
@pytest.mark.parametrize("options", OPTIONS)
def test_cross_entropy_matches_the_reference(device, options, workspace_mib):
    hidden, weight, ids, bias = make(device)
    ours = linear_cross_entropy(hidden, weight, ids, bias, workspace_mib=workspace_mib, **OPTIONS[options])
    reference = linear_cross_entropy_ref(hidden, weight, ids, bias, **OPTIONS[options])
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(reference)
    for found, expected in zip(
        grads_of(ours, (hidden, weight, bias), upstream),
        grads_of(reference, (hidden, weight, bias), upstream),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def test_token_weights_get_the_gradient_of_a_smoothed_loss_with_z_loss(device):
    hidden, weight, ids, bias = make(device)
    token_weights = torch.rand(ids.shape, dtype=torch.float64, device=device, requires_grad=True)
    options = {"label_smoothing": 0.2, "z_loss": 1e-2, "token_weights": token_weights, "num_items": 3.0}
    losses = (
        linear_cross_entropy(hidden, weight, ids, bias, **options),
        linear_cross_entropy_ref(hidden, weight, ids, bias, **options),
    )
    (found,), (expected,) = (grads_of(loss, token_weights) for loss in losses)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("frozen", ["nothing", "weight", "hidden"])
@pytest.mark.parametrize("options", HEAD_OPTIONS)
def test_log_probs_match_the_reference_for_any_upstream_gradient(device, options, frozen):
    hidden, weight, ids, bias = make(device)
    if frozen == "weight":
        weight, bias = weight.detach(), bias.detach()
    if frozen == "hidden":
        hidden = hidden.detach()
    trained = [t for t in (hidden, weight, bias) if t.requires_grad]
    ours = linear_logprobs(hidden, weight, ids, bias, workspace_mib=SEVERAL_CHUNKS, **HEAD_OPTIONS[options])
    reference = linear_token_stats_ref(hidden, weight, ids, bias, **HEAD_OPTIONS[options]).logp
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(reference)
    for found, expected in zip(grads_of(ours, trained, upstream), grads_of(reference, trained, upstream)):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("options", HEAD_OPTIONS)
def test_statistics_match_the_reference_for_any_upstream_gradient(device, options, frozen):
    hidden, weight, ids, bias = make(device)
    if frozen:
        weight, bias = weight.detach(), bias.detach()
    trained = [t for t in (hidden, weight, bias) if t.requires_grad]
    ours = linear_token_stats(
        hidden, weight, ids, bias, workspace_mib=SEVERAL_CHUNKS, **HEAD_OPTIONS[options]
    )
    reference = linear_token_stats_ref(hidden, weight, ids, bias, **HEAD_OPTIONS[options])
    assert torch.equal(ours.top1, reference.top1)
    mix = torch.randn(3, ids.numel(), dtype=torch.float64, device=device)
    outputs = []
    for stats in (ours, reference):
        outputs.append((mix * torch.stack([stats.logp, stats.entropy, stats.lse])).sum())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-12)
    for found, expected in zip(grads_of(outputs[0], trained), grads_of(outputs[1], trained)):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck_of_every_option(options):
    hidden, weight, ids, bias = make("cpu", N=6, H=4, V=11)
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_cross_entropy(h, w, ids, b, **OPTIONS[options]), (hidden, weight, bias)
    )


@pytest.mark.parametrize("options", HEAD_OPTIONS)
def test_gradcheck_of_the_statistics(options):
    hidden, weight, ids, bias = make("cpu", N=6, H=4, V=11)

    def statistics(h, w, b):
        return linear_token_stats(h, w, ids, b, **HEAD_OPTIONS[options])[:3]

    assert torch.autograd.gradcheck(statistics, (hidden, weight, bias))
    assert torch.autograd.gradcheck(
        lambda h: linear_logprobs(h, weight.detach(), ids, **HEAD_OPTIONS[options]), hidden
    )


def _eager_cross_entropy(hidden, weight, ids, bias):
    return F.cross_entropy(F.linear(hidden, weight, bias), ids)


def _eager_log_probs(hidden, weight, ids, bias):
    logp = F.linear(hidden, weight, bias).log_softmax(-1).gather(-1, ids.clamp(min=0)[:, None])[:, 0]
    return torch.where(ids >= 0, logp, 0.0)


@pytest.mark.parametrize("scale", [0.02, 3.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("shape", [(252, 123, 507), (1, 64, 1000), (300, 33, 129)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("function", ["cross_entropy", "log_probs", "log_probs frozen"])
def test_no_worse_than_eager(no_worse_than_eager, device, function, dtype, shape, scale):
    """Loss, log-probs and every gradient: error against fp64 at most twice that of plain PyTorch in the same
    dtype."""
    N, H, V = shape
    eager, ours = (
        (_eager_cross_entropy, linear_cross_entropy)
        if function == "cross_entropy"
        else (_eager_log_probs, linear_logprobs)
    )
    results = []
    for f, widen in ((ours, False), (eager, False), (eager, True)):
        draws = []
        for seed in range(
            4
        ):  # together: one draw's largest error hangs on how the GEMM rounds a single logit
            inputs = make(device, dtype, N=N, H=H, V=V, scale=scale, seed=seed)
            hidden, weight, ids, bias = (
                t.detach().double() if widen and t.is_floating_point() else t.detach() for t in inputs
            )
            trained = [hidden] if function == "log_probs frozen" else [hidden, weight, bias]
            for t in trained:
                t.requires_grad_()
            output = f(hidden, weight, ids, bias, **({"workspace_mib": 0.25} if f is ours else {}))
            upstream = torch.linspace(-1, 1, N, dtype=output.dtype, device=device) if output.dim() else None
            draws.append([output.detach(), *grads_of(output, trained, upstream)])
        results.append([torch.stack(tensors) for tensors in zip(*draws)])
    for name, found, same_dtype, truth in zip(("output", "d hidden", "d weight", "d bias"), *results):
        no_worse_than_eager(found, same_dtype, truth, name)


def rounded(device):
    """Whether dlogits enter GEMMs in bf16 beside bf16 hidden states."""
    return device == "cuda" or native.uses_gemm()


def test_weight_gradient_of_low_precision_is_summed_in_fp32(device):
    """With one token a chunk, bf16 sums would lose the later tokens; here the error stays that of rounding
    the result once."""
    hidden, weight, ids, _ = make(device, torch.bfloat16, N=512, H=16, V=64)
    truth = linear_cross_entropy_ref(
        hidden.double(), weight.detach().double().requires_grad_(), ids, reduction="sum"
    )
    w = weight.detach().double().requires_grad_()
    (expected,) = grads_of(linear_cross_entropy_ref(hidden.detach().double(), w, ids, reduction="sum"), [w])
    one_token = 64 * (6 if device == "cuda" else 4) / 2**20
    loss = linear_cross_entropy(hidden, weight, ids, reduction="sum", workspace_mib=one_token)
    call = TileCall(64, torch.bfloat16, device, True, True, None, one_token)
    assert token_chunk(512, call)[0] == 1
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)
    (found,) = grads_of(loss, [weight])
    assert (
        (found.double() - expected).abs()
        <= 2**-8 * expected.abs() + 1e-3 * expected.abs().max() * rounded(device) + 1e-5
    ).all()


@pytest.mark.parametrize("gemm", ["this machine's", "torch's"])
def test_fp32_master_weights_beside_low_precision_hidden_states(device, gemm, monkeypatch):
    """Logits are those of the rounded weight, whatever GEMM runs. The gradient of an fp32 weight comes back
    in fp32, from fp32 sums: it is not representable in bf16."""
    if gemm == "torch's":
        monkeypatch.setattr(native, "uses_gemm", lambda: False)
    hidden, weight, ids, bias = make(device, torch.float32)
    low = hidden.detach().bfloat16().requires_grad_()
    loss = linear_cross_entropy(low, weight, ids, bias)
    d_hidden, d_weight, d_bias = grads_of(loss, (low, weight, bias))
    assert d_hidden.dtype == torch.bfloat16 and d_weight.dtype == d_bias.dtype == torch.float32
    assert not torch.equal(d_weight, d_weight.bfloat16().float())
    exact = low.detach().double()
    w = weight.detach().bfloat16().double().requires_grad_()
    truth = linear_cross_entropy_ref(exact, w, ids, bias.detach().double())
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)
    (expected,) = grads_of(truth, [w])
    torch.testing.assert_close(
        d_weight.double(),
        expected,
        rtol=1e-2 if rounded(device) else 1e-4,
        atol=1e-3 if rounded(device) else 1e-6,
    )


def test_autocast_computes_in_the_autocast_dtype(device):
    hidden, weight, ids, bias = make(device, torch.float32)
    with torch.autocast(device, dtype=torch.bfloat16):
        found = linear_cross_entropy(hidden, weight, ids, bias)
    expected = linear_cross_entropy(hidden.bfloat16(), weight, ids, bias)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    for a, b in zip(grads_of(found, (hidden, weight, bias)), grads_of(expected, (hidden, weight, bias))):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_the_statistics_beside_the_loss_are_the_tokens(device):
    hidden, weight, ids, bias = make(device)
    both = linear_cross_entropy_stats(hidden, weight, ids, bias, workspace_mib=SEVERAL_CHUNKS)
    alone = linear_token_stats(hidden, weight, ids, bias)
    for name in ("logp", "entropy", "lse", "top1"):
        found = getattr(both, name)
        assert not found.requires_grad
        torch.testing.assert_close(found, getattr(alone, name).detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(both.loss, -alone.logp.sum() / (ids >= 0).sum())


def test_token_weights_weigh_and_get_a_gradient(device):
    hidden, weight, ids, _ = make(device, N=12)
    weights = torch.rand(12, dtype=torch.float64, device=device, requires_grad=True)
    nll = linear_cross_entropy(hidden, weight, ids, reduction="none").detach()
    loss = linear_cross_entropy(hidden, weight, ids, token_weights=weights)
    torch.testing.assert_close(loss, (weights * nll).sum() / weights[ids >= 0].sum())
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, weight.detach(), ids, token_weights=w), (hidden, weights)
    )


def test_ignored_tokens_enter_no_gemm(monkeypatch):
    """The rows that reach the chunk loop's GEMMs are the kept ones. (On a GPU the first chunk may hold
    others: the count comes late.)"""
    hidden, weight, ids, bias = make("cpu")
    counted = []
    original = chunks.mm
    monkeypatch.setattr(
        chunks, "mm", lambda a, b, out: counted.append(tuple(out.shape)) or original(a, b, out)
    )
    linear_cross_entropy(hidden, weight, ids, bias, workspace_mib=SEVERAL_CHUNKS)
    assert sum(rows for rows, columns in counted if columns == 123) == int((ids >= 0).sum())


def test_ignored_hidden_states_are_never_read(device):
    """NaN in them reaches no gradient, and their own gradient is 0."""
    hidden, weight, ids, bias = make(device)
    poisoned = hidden.detach().masked_fill((ids < 0)[:, None], float("nan")).requires_grad_()
    loss = linear_cross_entropy(poisoned, weight, ids, bias, workspace_mib=SEVERAL_CHUNKS)
    d_hidden, d_weight = grads_of(loss, (poisoned, weight))
    assert (d_hidden[ids < 0] == 0).all() and d_hidden.isfinite().all() and d_weight.isfinite().all()
    logp = linear_logprobs(poisoned, weight, ids)
    assert (logp[ids < 0] == 0).all()
    assert (grads_of(logp, [poisoned])[0][ids < 0] == 0).all()


@pytest.mark.parametrize("targets", ["all ignored", "no tokens"])
def test_nothing_to_average_is_nan_with_zero_gradients(device, targets):
    hidden, weight, ids, bias = make(device)
    if targets == "no tokens":
        hidden, ids = hidden[:0], ids[:0]
    ids = torch.full_like(ids, -100)
    loss = linear_cross_entropy(hidden, weight, ids, bias)
    assert loss.isnan()
    assert linear_cross_entropy(hidden, weight, ids, bias, num_items=3) == 0
    assert linear_cross_entropy(hidden, weight, ids, bias, reduction="sum") == 0
    for reduction in ("mean", "sum"):
        loss = linear_cross_entropy(hidden, weight, ids, bias, reduction=reduction)
        for grad in grads_of(loss, (hidden, weight, bias)):
            assert (grad == 0).all()
    logp = linear_logprobs(hidden, weight, ids, bias)
    assert logp.shape == ids.shape and (logp == 0).all()


def test_second_backward_and_upstream_scale(device):
    """Gradients are scaled where they lie and handed over; a second backward pass still gets its own, with
    its own scale."""
    hidden, weight, ids, bias = make(device)
    loss = linear_cross_entropy(hidden, weight, ids, bias, label_smoothing=0.1)
    expected = grads_of(
        linear_cross_entropy_ref(hidden, weight, ids, bias, label_smoothing=0.1), (hidden, weight, bias)
    )
    for scale in (3.0, 0.0, -2.0):
        found = torch.autograd.grad(loss * scale, (hidden, weight, bias), retain_graph=True)
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, scale * b, rtol=1e-11, atol=1e-12)


def test_tied_weight_gets_both_gradients(device):
    _, weight, ids, _ = make(device)
    ids = ids.clamp(min=0)
    hidden = torch.tanh(F.embedding(ids, weight))
    (found,) = grads_of(linear_cross_entropy(hidden, weight, ids.roll(1)), [weight])
    (expected,) = grads_of(
        linear_cross_entropy_ref(torch.tanh(F.embedding(ids, weight)), weight, ids.roll(1)), [weight]
    )
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def test_leading_dims_and_strides(device):
    hidden, weight, ids, bias = make(device, N=24)
    flat = linear_token_stats(hidden, weight, ids, bias)
    shaped = linear_token_stats(hidden.view(2, 3, 4, -1), weight, ids.view(2, 3, 4).int(), bias)
    torch.testing.assert_close(shaped.logp, flat.logp.view(2, 3, 4))
    strided = linear_token_stats(hidden.t().contiguous().t(), weight.t().contiguous().t(), ids, bias)
    torch.testing.assert_close(strided.entropy, flat.entropy, rtol=1e-12, atol=1e-12)
    step = linear_logprobs(hidden[::2], weight, ids[::2], bias)
    torch.testing.assert_close(step, flat.logp[::2], rtol=1e-12, atol=1e-12)
    one = linear_logprobs(hidden[5], weight, ids[5], bias)
    torch.testing.assert_close(one, flat.logp[5], rtol=1e-12, atol=1e-12)


def test_large_logits_keep_their_precision(device):
    """|z| = 1e4 in fp32: P comes from (z - max) - log sum; exp(z - lse) would be off by 1e-3."""
    hidden, weight, ids, _ = make(device, torch.float32, N=8, H=4, V=50)
    hidden = (hidden.detach() * 2000).requires_grad_()
    (found,) = grads_of(linear_cross_entropy(hidden, weight, ids), [hidden])
    logits = (hidden @ weight.t()).detach()  # the GEMM's own rounding is common to both
    p = logits.double().softmax(-1)
    kept = (ids >= 0)[:, None]
    expected = (
        torch.where(kept, (p - F.one_hot(ids.clamp(min=0), 50)) @ weight.detach().double(), 0) / kept.sum()
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
