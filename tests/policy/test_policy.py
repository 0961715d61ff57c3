"""The losses of policy optimisation against their specifications, closed forms and identities, on every
implementation."""

from __future__ import annotations

import math

import pytest
import torch

from fastalign_kernels.policy import ops as policy
from fastalign_kernels.policy.arguments import AGGREGATIONS
from fastalign_kernels.policy.losses import ppo_loss, value_loss
from fastalign_kernels.policy.ops import KL_ESTIMATORS
from fastalign_kernels.policy.reference import ppo_loss_ref, value_loss_ref
from tests import marks
from tests.policy.tokens import FULL, NAN, gradients, tokens, values

pytestmark = marks.KERNELS


CLIPS = {
    "clip": {},
    "asymmetric": {"clip": 0.1, "clip_high": 0.3},
    "dual": {"dual_clip": 1.5},
    "upper alone": {"clip": None, "clip_high": 0.1},
    "none": {"clip": None},
}


@pytest.fixture(params=["chosen", "pytorch", "triton"])
def implementation(request, monkeypatch):
    """What a CPU or a GPU runs, PyTorch in its place, and Triton's kernels: compiled on a GPU, interpreted on
    a CPU."""
    if request.param == "triton":
        other = pytest.importorskip(
            "fastalign_kernels.policy.losses_triton", reason="triton is not installed", exc_type=ImportError
        )
    else:
        other = policy.KERNELS.reference
    if request.param != "chosen":
        monkeypatch.setattr(policy.KERNELS, "select", lambda _: other)
    return request.param


def assert_same(found, expected, given, tolerance=1e-12):
    for name, a, b in zip(expected._fields, found, expected):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(
                a, b, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
            )
            assert a.requires_grad == (name == "loss") and a.shape == ()
    ours, theirs = gradients(found.loss, given), gradients(expected.loss, given)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    for gradient in ours:
        assert not gradient[~given["mask"]].any()
    torch.testing.assert_close(gradients(found.loss, given), ours, rtol=0, atol=0)  # a second backward


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("clip", CLIPS)
def test_matches_the_specification(device, clip, aggregation, estimator):
    given = tokens(device=device)
    options = {
        **FULL,
        "clip_high": None,
        "dual_clip": None,
        **CLIPS[clip],
        "aggregation": aggregation,
        "kl_estimator": estimator,
    }
    for normalizer in (None, 7, torch.tensor(2.5, device=device)):
        options["normalizer"] = normalizer
        assert_same(ppo_loss(**given, **options), ppo_loss_ref(**given, **options), given)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_packed_equals_padded(device, aggregation):
    """[N] with cu_seqlens, and [N] of the tokens alone, give what [B, T] gives."""
    given = tokens(device=device)
    mask = given["mask"]
    padded = ppo_loss(**given, **FULL, aggregation=aggregation)
    flat = {name: x.detach().reshape(-1).requires_grad_(x.requires_grad) for name, x in given.items()}
    packed = {name: x.detach()[mask].requires_grad_(x.requires_grad) for name, x in given.items()}
    ends = torch.cat([mask.new_zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    for layout, cu_seqlens in ((flat, torch.arange(0, 5 * 23 + 1, 23, device=device)), (packed, ends.int())):
        found = ppo_loss(**layout, **FULL, aggregation=aggregation, cu_seqlens=cu_seqlens)
        torch.testing.assert_close(tuple(found), tuple(padded), rtol=1e-12, atol=1e-12)
        expected = ppo_loss_ref(**layout, **FULL, aggregation=aggregation, cu_seqlens=cu_seqlens)
        assert_same(found, expected, layout)


def test_gradcheck():
    given = {name: x for name, x in tokens(shape=(3, 5)).items() if name not in ("logp", "entropy")}
    mask = given["mask"]
    random = torch.randn(4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    logp, entropy = (x.clone().requires_grad_() for x in random[:2])
    given["old_logp"] = logp.detach() + 0.15
    for options in (*CLIPS.values(), {"clip": 0.5, "aggregation": "sequence_mean", "kl_estimator": "k2"}):
        both = {**FULL, "clip_high": None, "dual_clip": None, **options}
        assert torch.autograd.gradcheck(
            lambda x, h, o=both: ppo_loss(x, entropy=h, **given, **o).loss, (logp, entropy)
        )
    old, target = random[2:]
    for clip in (0.3, None):
        assert torch.autograd.gradcheck(lambda v, c=clip: value_loss(v, old, target, mask, clip=c).loss, logp)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_no_worse_than_eager(implementation, no_worse_than_eager, device, dtype):
    """Loss, metrics and gradients at several blocks with a ragged end; the truth sees the rounded inputs."""
    given = tokens(dtype, (3, 1111), device=device)
    wide = {
        name: x if name == "mask" else x.detach().double().requires_grad_(x.requires_grad)
        for name, x in given.items()
    }
    for aggregation, estimator in zip(AGGREGATIONS, KL_ESTIMATORS):
        options = {**FULL, "aggregation": aggregation, "kl_estimator": estimator}
        found, eager, truth = (
            ppo_loss(**given, **options),
            ppo_loss_ref(**given, **options),
            ppo_loss_ref(**wide, **options),
        )
        for name, ours, theirs, true in zip(found._fields, found, eager, truth):
            assert ours.dtype == torch.float32
            no_worse_than_eager(ours.detach(), theirs.detach(), true.detach(), name)
        for ours, theirs, true in zip(
            *(gradients(x.loss, y) for x, y in ((found, given), (eager, given), (truth, wide)))
        ):
            assert ours.dtype == dtype
            no_worse_than_eager(ours, theirs, true, f"gradient, {aggregation}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("clip", CLIPS)
def test_huge_log_ratios(implementation, no_worse_than_eager, device, clip, dtype):
    """+-1e4 nats between policies, both signs of the advantage: everything finite, and as right as eager."""
    d = torch.tensor([1e4, 1e4, -1e4, -1e4, 21, 21, -21, -21, 19, -19, 0, 1e-3], device=device)
    a = torch.tensor([1, -1] * 6, device=device)
    for estimator in KL_ESTIMATORS:
        options = {**CLIPS[clip], "kl_coefficient": 0.01, "kl_estimator": estimator, "aggregation": "sum"}
        results = []
        for function, kind in ((ppo_loss, dtype), (ppo_loss_ref, dtype), (ppo_loss_ref, torch.float64)):
            logp = d.to(dtype).to(kind).requires_grad_()
            zeros = torch.zeros_like(logp).detach()
            out = function(logp, zeros, a.to(kind), zeros == 0, reference_logp=zeros, **options)
            # fp16 ends at 65504 and e^20 lies above: the loss is scaled as training in fp16 scales it.
            results.append([out.loss.detach(), *torch.autograd.grad(1e-6 * out.loss, logp)])
        for ours, eager, truth in zip(*results):
            assert ours.isfinite().all()
            # The loss adds up k1's terms of ±100, which cancel: its error depends on the order of adding.
            cancel = estimator == "k1" and truth.dim() == 0
            no_worse_than_eager(
                ours, eager, truth, clip, terms=max(1.0, 100 / abs(truth.item())) if cancel else 1
            )


def test_beyond_20_nats_the_ratio_has_no_gradient(implementation, device):
    d = torch.tensor([-1e4, -20.5, 20.5, 1e4], device=device, requires_grad=True)
    zeros = torch.zeros(4, device=device)
    for sign in (1.0, -1.0):
        out = ppo_loss(d, zeros, zeros + sign, zeros == 0, clip=None, aggregation="sum")
        assert not torch.autograd.grad(out.loss, d)[0].any()
        assert out.mean_ratio.item() == pytest.approx(
            math.exp(20) / 2
        ) and out.approx_kl.item() == pytest.approx((1e8 + 20.5**2) / 4)


def test_known_points(implementation, device):
    """A = 2 and -2 at ratios 0.5, 1 and 2 with clips 0.8 and 1.2, dual clip 1.5, by hand."""
    logp = torch.tensor([0.5, 1.0, 2.0] * 2, device=device).log().requires_grad_()
    a = torch.tensor([2.0] * 3 + [-2.0] * 3, device=device)
    zeros = torch.zeros(6, device=device)
    out = ppo_loss(
        logp,
        zeros,
        a,
        zeros == 0,
        dual_clip=1.5,
        entropy=zeros + 3,
        entropy_coefficient=0.5,
        reference_logp=zeros,
    )
    policies = [-1.0, -2.0, -2.4, 1.6, 2.0, 3.0]
    assert out.policy_loss.item() == pytest.approx(sum(policies) / 6)
    assert out.loss.item() == pytest.approx(sum(policies) / 6 - 1.5)
    assert out.clip_fraction.item() == pytest.approx(3 / 6) and out.entropy.item() == 3
    assert out.mean_ratio.item() == pytest.approx(3.5 / 3)
    ln2 = math.log(2)
    assert out.approx_kl.item() == pytest.approx(4 * 0.5 * ln2**2 / 6)
    assert out.kl.item() == pytest.approx(2 * ((2 - 1 - ln2) + (0.5 - 1 + ln2)) / 6)
    (gradient,) = torch.autograd.grad(out.loss, logp)
    torch.testing.assert_close(gradient * 6, torch.tensor([-1.0, -2.0, 0.0, 0.0, 2.0, 0.0], device=device))


def test_the_first_minibatch(implementation, device):
    """Ratio 1, clip fraction 0, approximate KL 0, the loss minus the mean advantage, and the policy
    gradient."""
    given = tokens(torch.float32, device=device)
    logp, a, mask = given["logp"], given["advantages"], given["mask"]
    out = ppo_loss(logp, logp.detach(), a, mask, reference_logp=logp.detach())
    assert out.mean_ratio == 1 and out.clip_fraction == 0 and out.approx_kl == 0 and out.kl == 0
    assert out.entropy is None
    torch.testing.assert_close(out.loss, -a[mask].mean())
    (gradient,) = torch.autograd.grad(out.loss, logp)
    torch.testing.assert_close(gradient[mask], -a[mask] / mask.sum())
    none = ppo_loss(logp, logp.detach(), a, mask)
    assert none.kl is None and none.entropy is None


def test_small_kl_keeps_its_digits(implementation, device):
    """k3 of log-ratios of 1e-4 is 5e-9: e^-d - 1 + d would lose all of it."""
    d = torch.tensor([1e-4, -1e-4, 1e-2, -0.49, 0.51], device=device)
    for one in d:
        logp, zero = one[None].clone().requires_grad_(), torch.zeros(1, device=device)
        out = ppo_loss(logp, zero, zero, zero == 0, reference_logp=zero, kl_coefficient=1.0)
        wide = one.double()
        assert out.kl.item() == pytest.approx(
            (torch.expm1(-wide) + wide).item(), rel=1e-6 if implementation != "pytorch" else 1
        )
        assert torch.autograd.grad(out.loss, logp)[0].item() == pytest.approx(
            -torch.expm1(-wide).item(), rel=1e-5
        )


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_add_up(device, aggregation):
    """With the whole batch's normalizer, rows split over micro-batches or ranks give the batch's loss and
    gradients."""
    given = tokens(device=device)
    mask = given["mask"]
    normalizer = {"token_mean": mask.sum(), "sequence_mean": mask.any(1).sum(), "sum": None}[aggregation]
    whole = ppo_loss(**given, **FULL, aggregation=aggregation)
    parts = [{name: x[rows] for name, x in given.items()} for rows in (slice(0, 2), slice(2, 3), slice(3, 5))]
    split = sum(
        ppo_loss(**part, **FULL, aggregation=aggregation, normalizer=normalizer).loss for part in parts
    )
    torch.testing.assert_close(split, whole.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(split, given), gradients(whole.loss, given), rtol=1e-12, atol=1e-12)
    wide = values(device=device) | {"values": values(device=device)["values"].requires_grad_()}
    parts = [{name: x[rows] for name, x in wide.items()} for rows in (slice(0, 2), slice(2, 5))]
    split = sum(value_loss(**part, normalizer=mask.sum()).loss for part in parts)
    torch.testing.assert_close(split, value_loss(**wide).loss, rtol=1e-12, atol=1e-12)


def test_a_normalizer_of_sequence_means_keeps_its_digits_in_fp64():
    """A count of tokens times a Python number is fp32, and put 3e-8 into the loss."""
    given = tokens() | {"mask": torch.ones(5, 23, dtype=torch.bool)}
    given = {name: x if name == "mask" else x.detach().nan_to_num(0, 0, 0) for name, x in given.items()}
    options = {"aggregation": "sequence_mean", "normalizer": 37.1997005624994}
    torch.testing.assert_close(
        ppo_loss(**given, **options).loss, ppo_loss_ref(**given, **options).loss, rtol=1e-14, atol=0
    )


def test_sequence_means_weigh_sequences_alike():
    logp, a = torch.zeros(2, 4, requires_grad=True), torch.tensor([[1.0] * 4, [3.0] + [NAN] * 3])
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    out = ppo_loss(logp, logp.detach(), a, mask, aggregation="sequence_mean")
    assert out.loss.item() == -2 and out.policy_loss.item() == pytest.approx(-7 / 5)
    (gradient,) = torch.autograd.grad(out.loss, logp)
    assert gradient.tolist() == [[-0.125] * 4, [-1.5, 0, 0, 0]]


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (1,), (1, 1), (17,)], ids=str)
def test_any_shape_and_an_empty_mask(implementation, device, shape):
    given = tokens(torch.float32, shape, device=device)
    aggregation = "sequence_mean" if len(shape) == 2 else "token_mean"
    empty = given | {"mask": torch.zeros(shape, dtype=torch.bool, device=device)}
    out = ppo_loss(**empty, **FULL, aggregation=aggregation)
    assert all(x == 0 for x in out)
    for gradient in gradients(out.loss, given):
        assert gradient.shape == shape and not gradient.any()
    nothing = value_loss(given["logp"], given["old_logp"], given["advantages"], empty["mask"])
    assert nothing.loss == 0 and nothing.clip_fraction == 0 and nothing.explained_variance.isnan()
    assert not torch.autograd.grad(nothing.loss, given["logp"])[0].any()
    first = {
        name: torch.nan_to_num(x.detach(), 1, 1, 1).requires_grad_(x.requires_grad)
        for name, x in given.items()
        if name != "mask"
    }
    mask = empty["mask"].clone()
    mask.view(-1)[:1] = True
    found, expected = (
        f(**first, mask=mask, **FULL, aggregation=aggregation) for f in (ppo_loss, ppo_loss_ref)
    )
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-5, atol=1e-6)


def test_nan_inside_the_mask_shows(implementation, device):
    for name in ("logp", "old_logp", "advantages", "entropy", "reference_logp"):
        given = tokens(torch.float32, device=device)
        with torch.no_grad():
            given[name][2, 5] = NAN
        assert ppo_loss(**given, **FULL).loss.isnan(), name


@pytest.mark.parametrize("clip", [0.2, None, 3.0])
def test_value_loss_matches_the_specification(device, clip):
    given = values(device=device)
    given["values"].requires_grad_()
    for normalizer in (None, 11.0):
        found, expected = (f(**given, clip=clip, normalizer=normalizer) for f in (value_loss, value_loss_ref))
        assert_same(found, expected, given, 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_value_loss_in_low_precision(implementation, no_worse_than_eager, device, dtype):
    given = values(dtype, (3, 1111), device=device)
    wide = {name: x if name == "mask" else x.double() for name, x in given.items()}
    results = []
    for function, inputs in ((value_loss, given), (value_loss_ref, given), (value_loss_ref, wide)):
        inputs["values"].requires_grad_()
        out = function(**inputs)
        results.append([*(x.detach() for x in out), *gradients(out.loss, inputs)])
    for ours, eager, truth in zip(*results):
        no_worse_than_eager(ours, eager, truth, str(dtype))


def test_value_loss_by_hand(implementation, device):
    """v 1, v_old 0, clip 0.2: held at 0.2. R 2: the held one is worse; R -1: the free one. Then unclipped."""
    v = torch.tensor([1.0, 1.0, 0.1], device=device, requires_grad=True)
    target, old = torch.tensor([2.0, -1.0, 1.0], device=device), torch.zeros(3, device=device)
    out = value_loss(v, old, target, old == 0)
    assert out.loss.item() == pytest.approx((1.8**2 + 2**2 + 0.9**2) / 6)
    assert out.clip_fraction.item() == pytest.approx(1 / 3)
    error, spread = torch.tensor([-1.0, 2.0, -0.9]).var(correction=0), target.cpu().var(correction=0)
    assert out.explained_variance.item() == pytest.approx((1 - error / spread).item(), rel=1e-5)
    assert torch.autograd.grad(out.loss, v)[0].tolist() == pytest.approx([0, 2 / 3, -0.9 / 3])
    perfect = value_loss(target, old, target, old == 0)
    assert perfect.explained_variance == 1
    assert value_loss(target, target, target * 0 + 5, old == 0).explained_variance.isnan()


def test_explained_variance_far_from_zero(device):
    """Returns around 1e4 with a spread of 1, where fp32 sums of squares would have no digit left."""
    noise = torch.randn(4096, generator=torch.Generator().manual_seed(0)).to(device)
    target = 1e4 + noise
    found = value_loss(target - 0.1 * noise, target, target, noise == noise).explained_variance
    assert found.item() == pytest.approx(0.99, abs=1e-3)
