"""Losses from logits: values, gradients, options, strides, in-place backward, refusals."""

import pytest
import torch
import torch.nn.functional as F

from fastalign_kernels import cross_entropy, sum_by_sequence, token_logprobs, token_stats
from fastalign_kernels.logits import cross_entropy_ref, token_stats_ref

OPTIONS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 7.0},
    "temperature": {"temperature": 0.6},
    "num_items": {"num_items": 3.0},
    "all": {
        "label_smoothing": 0.2,
        "z_loss": 1e-2,
        "softcap": 7.0,
        "temperature": 1.4,
        "num_items": torch.tensor(5),
    },
}
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def make(device, dtype=torch.float64, shape=(2, 5), V=61, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(*shape, V, generator=generator, dtype=torch.float64)).to(dtype).to(device)
    targets = torch.randint(0, V, shape, generator=generator).to(device)
    targets.view(-1)[::4] = -100
    return logits.requires_grad_(), targets


@pytest.mark.parametrize("options", OPTIONS)
def test_matches_the_reference(device, options):
    logits, targets = make(device)
    loss, expected = (
        cross_entropy(logits, targets, **OPTIONS[options]),
        cross_entropy_ref(logits, targets, **OPTIONS[options]),
    )
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-13)
    upstream = torch.randn_like(expected)
    (grad,), (grad_expected,) = (torch.autograd.grad(x, logits, upstream) for x in (loss, expected))
    torch.testing.assert_close(grad, grad_expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_matches_torch(device, reduction, smoothing):
    """The conventions of reduction, ignore_index and label_smoothing are
    torch.nn.functional.cross_entropy's."""
    logits, targets = make(device)
    ours = cross_entropy(logits, targets, reduction=reduction, label_smoothing=smoothing)
    theirs = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction=reduction, label_smoothing=smoothing
    )
    torch.testing.assert_close(ours, theirs.view(ours.shape), rtol=1e-13, atol=1e-13)


def test_another_ignore_index_is_torchs(device):
    logits, targets = make(device)
    targets = targets.where(targets != -100, 60)  # an id of the vocabulary
    ours = cross_entropy(logits, targets, ignore_index=60)
    torch.testing.assert_close(
        ours,
        F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=60),
        rtol=1e-13,
        atol=1e-13,
    )


def test_z_loss_adds_the_square_of_the_logsumexp(device):
    logits, targets = make(device)
    ours = cross_entropy(logits, targets, z_loss=0.3)
    lse = logits.logsumexp(-1)[targets != -100]
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(ours, nll + 0.3 * (lse**2).mean(), rtol=1e-13, atol=1e-13)
    (grad,), (expected,) = (
        torch.autograd.grad(x, logits, retain_graph=True) for x in (ours, nll + 0.3 * (lse**2).mean())
    )
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-13)


def test_token_weights_weigh_and_get_a_gradient(device):
    logits, targets = make(device)
    weights = torch.rand(2, 5, dtype=torch.float64, device=device, requires_grad=True)
    kept = targets != -100
    nll = cross_entropy(logits, targets, reduction="none").detach()
    loss = cross_entropy(logits, targets, token_weights=weights)
    torch.testing.assert_close(loss, (weights * nll).sum() / weights[kept].sum())
    assert torch.autograd.gradcheck(
        lambda w: cross_entropy(logits.detach(), targets, token_weights=w), weights
    )
    poisoned = weights.detach().masked_fill(~kept, float("nan"))
    torch.testing.assert_close(cross_entropy(logits, targets, token_weights=poisoned), loss)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck_of_every_option(options):
    logits, targets = make("cpu", V=11)
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, targets, **OPTIONS[options]), logits)


def test_gradcheck_of_the_statistics():
    logits, ids = make("cpu", V=11)

    def function(x):
        stats = token_stats(x, ids, softcap=5.0, temperature=1.3)
        return stats.logp, stats.entropy, stats.lse

    assert torch.autograd.gradcheck(function, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_worse_than_eager(no_worse_than_eager, device, dtype):
    logits, targets = make(device, dtype, shape=(3, 84), V=507)
    truth = logits.detach().double().requires_grad_()
    eager = logits.detach().clone().requires_grad_()
    pairs = []
    for x, function in (
        (logits, cross_entropy),
        (eager, lambda z, t: F.cross_entropy(z.flatten(0, 1), t.flatten())),
        (truth, cross_entropy_ref),
    ):
        loss = function(x, targets)
        (grad,) = torch.autograd.grad(loss * 1.7, x)
        pairs.append((loss.detach(), grad))
    (ours, ours_grad), (theirs, theirs_grad), (true, true_grad) = pairs
    no_worse_than_eager(ours, theirs, true, "loss")
    no_worse_than_eager(ours_grad, theirs_grad, true_grad, "gradient")


def test_shifted_logits_are_not_copied(device, monkeypatch):
    """logits[:, :-1] of [B, T, V] reach the kernel as the view they are."""
    logits, targets = make(device, torch.float32, shape=(2, 6))
    seen = []
    from fastalign_kernels import logits_ops as module

    original = module.row_stats
    monkeypatch.setattr(module, "row_stats", lambda x, *rest: seen.append(x.data_ptr()) or original(x, *rest))
    shifted = logits.detach()[:, :-1]
    found = token_logprobs(shifted, targets[:, 1:].clone())
    assert seen == [shifted.data_ptr()]
    expected = token_stats_ref(shifted, targets[:, 1:]).logp
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "4-d", "1-d", "column step"])
def test_any_strides_and_leading_dims(device, layout):
    base, _ = make(device, torch.float64, shape=(4, 6), V=20)
    base = base.detach()
    logits = {
        "transposed": base.transpose(0, 1),
        "expanded": base[:1].expand(5, 6, 20),
        "4-d": base.view(2, 2, 6, 20).transpose(1, 2),
        "1-d": base[0, 0],
        "column step": base[..., ::2],
    }[layout]
    ids = torch.randint(0, logits.shape[-1], logits.shape[:-1], device=device)
    found, expected = token_stats(logits, ids), token_stats_ref(logits.contiguous(), ids)
    for name in ("logp", "entropy", "lse"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-12, atol=1e-12)
    assert torch.equal(found.top1, expected.top1)


def test_nothing_to_average_is_nan_with_zero_gradient(device):
    logits, targets = make(device)
    loss = cross_entropy(logits, torch.full_like(targets, -100))
    assert loss.isnan()
    (grad,) = torch.autograd.grad(loss, logits)
    assert (grad == 0).all()
    assert cross_entropy(logits[:0], targets[:0]).isnan()
    assert cross_entropy(logits[:0], targets[:0], num_items=3) == 0
    assert cross_entropy(logits[:0], targets[:0], reduction="sum") == 0


def test_ignored_rows_are_not_read(device):
    logits, targets = make(device)
    poisoned = logits.detach().masked_fill((targets == -100)[..., None], float("nan")).requires_grad_()
    torch.testing.assert_close(cross_entropy(poisoned, targets), cross_entropy(logits, targets))
    stats = token_stats(poisoned, targets)
    assert (stats.logp[targets == -100] == 0).all() and not stats.top1[targets == -100].any()
    (grad,) = torch.autograd.grad(stats.logp.sum() + stats.entropy.sum() + stats.lse.sum(), poisoned)
    assert (grad[targets == -100] == 0).all() and grad.isfinite().all()


def test_in_place_backward(device):
    """The logits become their gradient; another user of the saved logits is told so by autograd."""
    logits, targets = make(device)
    (expected,) = torch.autograd.grad(cross_entropy(logits, targets), logits)
    buffer = logits.detach() * 1.0
    x = buffer.requires_grad_() * 1.0
    (grad,) = torch.autograd.grad(cross_entropy(x, targets, inplace_backward=True), x)
    assert grad.data_ptr() == x.data_ptr()
    torch.testing.assert_close(grad, expected, rtol=0, atol=0)
    y = buffer * 1.0
    loss = cross_entropy(y, targets) + cross_entropy(
        y, targets, inplace_backward=True
    )  # the later node runs backward first
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(ValueError, match="inplace_backward"):
        cross_entropy(buffer[:1].expand(2, 5, 61), targets, inplace_backward=True)


def test_entropy_and_argmax_identities(device):
    V = 37
    flat = torch.zeros(1, V, dtype=torch.float64, device=device)
    stats = token_stats(flat, torch.tensor([5], device=device))
    torch.testing.assert_close(stats.entropy, torch.full_like(stats.entropy, float(torch.tensor(V).log())))
    assert stats.top1.all(), "a tie with the maximum is a top-1"
    logits, ids = make(device)
    ids = ids.clamp(min=0)
    assert torch.equal(token_stats(logits, ids).top1, logits.argmax(-1) == ids)
    assert (token_logprobs(logits, ids) <= 0).all()
    assert token_stats(logits, ids, entropy=False).entropy is None


def test_compiles_without_a_graph_break(device):
    logits, targets = make(device)

    def function(x):
        stats = token_stats(x[:, :-1], targets[:, 1:].clone())
        return cross_entropy(x, targets, label_smoothing=0.1) + stats.entropy.sum() + stats.logp.sum()

    def in_place(x):
        return cross_entropy(x * 1.0, targets, inplace_backward=True)

    for f in (function, in_place):
        expected, found = f(logits), torch.compile(f, fullgraph=True)(logits)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, logits), torch.autograd.grad(expected, logits))


def test_opcheck():
    logits, ids = make("cpu", V=11)
    logits, ids = logits.detach(), ids.flatten().clamp(min=-1)
    ops, needs = torch.ops.fastalign, [True, True]
    torch.library.opcheck(
        ops.token_table.default, (logits.clone().requires_grad_(), ids, 5.0, 0.7, needs, False)
    )
    table = ops.token_table(logits, ids, 0.0, 1.0, needs, False)
    coefficient = torch.randn(4, ids.numel(), dtype=torch.float64)
    arguments = (ids, table, coefficient, 0.0, 1.0, needs)
    torch.library.opcheck(ops.token_table_grad.default, (logits, *arguments))


@pytest.mark.parametrize(
    "change, named",
    [
        ({"targets": torch.zeros(2, 4, dtype=torch.int64)}, r"targets: got shape \[2, 4\]"),
        ({"targets": torch.zeros(2, 5)}, r"targets: got torch.float32"),
        (
            {"targets": torch.full((2, 5), 61)},
            r"targets: got 61 at \[0, 0\] \(10 such\), expected ids in \[0, 61\)",
        ),
        ({"targets": torch.full((2, 5), -1)}, r"targets: got -1 at"),
        ({"logits": torch.zeros(2, 5, 61, dtype=torch.int64)}, r"logits: got torch.int64"),
        ({"logits": torch.zeros(2, 5, 0)}, r"logits: got shape \[2, 5, 0\]"),
        ({"temperature": 0.0}, r"temperature: got 0.0"),
        ({"softcap": -1.0}, r"softcap: got -1.0"),
        ({"label_smoothing": 1.5}, r"label_smoothing: got 1.5"),
        ({"z_loss": -1.0}, r"z_loss: got -1.0"),
        ({"reduction": "avg"}, r"reduction: got 'avg', expected one of mean, sum, none"),
        ({"reduction": "sum", "num_items": 3}, r"num_items: got 3"),
        ({"num_items": 0}, r"num_items: got 0"),
        ({"token_weights": torch.ones(3)}, r"token_weights: got shape \[3\]"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_refusals_name_the_argument(change, named):
    arguments = {"logits": torch.zeros(2, 5, 61), "targets": torch.zeros(2, 5, dtype=torch.int64)} | change
    with pytest.raises(ValueError, match=named):
        cross_entropy(arguments.pop("logits"), arguments.pop("targets"), **arguments)


def test_sum_by_sequence(device):
    values = torch.randn(10, dtype=torch.float64, device=device, requires_grad=True)
    cu_seqlens = torch.tensor([0, 3, 3, 9, 10], dtype=torch.int32, device=device)
    sums = sum_by_sequence(values, cu_seqlens)
    torch.testing.assert_close(
        sums, torch.stack([values[:3].sum(), values[:0].sum(), values[3:9].sum(), values[9]])
    )
    mean = sum_by_sequence(values, cu_seqlens, mean=True)
    assert mean[1].isnan()
    torch.testing.assert_close(mean[[0, 2, 3]], sums[[0, 2, 3]] / torch.tensor([3, 6, 1], device=device))
    assert torch.autograd.gradcheck(lambda v: sum_by_sequence(v, cu_seqlens), values)
    broken = values.detach().clone()
    broken[0] = float("nan")
    assert sum_by_sequence(broken, cu_seqlens).isnan().tolist() == [True, False, False, False], (
        "one sequence's NaN stays its own"
    )
    compiled = torch.compile(sum_by_sequence, fullgraph=True)
    torch.testing.assert_close(compiled(values, cu_seqlens), sums)
    many = torch.rand(100_000, device=device)
    exact = many.double().sum().float()
    assert sum_by_sequence(many, torch.tensor([0, 100_000], device=device))[0] == exact
    assert sum_by_sequence(values.to(torch.bfloat16), cu_seqlens).dtype == torch.float32


@pytest.mark.parametrize("ends", [[0, 3, 2, 10], [1, 10], [0, 9], [0, 11]])
def test_sum_by_sequence_refuses_offsets_that_do_not_fit(ends):
    with pytest.raises(ValueError, match="cu_seqlens"):
        sum_by_sequence(torch.zeros(10), torch.tensor(ends))
