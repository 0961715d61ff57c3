"""Losses of sequences against their specifications, closed forms, each other, and both kernels' twins."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from fastalign_kernels.preference import losses as preference
from fastalign_kernels.preference.formulas import DPO_LOSS_TYPES, PAIR_LOSSES
from fastalign_kernels.preference.losses import (
    cpo_loss,
    dpo_loss,
    kto_kl,
    kto_loss,
    orpo_loss,
    reward_loss,
    simpo_loss,
)
from fastalign_kernels.preference.reference import (
    cpo_loss_ref,
    dpo_loss_ref,
    kto_loss_ref,
    orpo_loss_ref,
    reward_loss_ref,
    simpo_loss_ref,
)

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings(
        "ignore:.*encountered in:RuntimeWarning"
    ),  # numpy's, inside Triton's interpreter: overflow to inf is meant
]

SMOOTHING = {"sigmoid": 0.2, "robust": 0.2, "exo_pair": 0.1, "sigmoid_norm": 0.3}
S = 7


def lengths(device="cpu", shape=(S,)):
    n = torch.randint(1, 9, (2, *shape), generator=torch.Generator().manual_seed(3)).to(device)
    return {"chosen_lengths": n[0], "rejected_lengths": n[1]}


def options_of(loss_type, device="cpu", shape=(S,)):
    """Options that exercise all of a DPO loss."""
    by_length = lengths(device, shape) if PAIR_LOSSES[loss_type].lengths != "refused" else {}
    return {
        "loss_type": loss_type,
        "label_smoothing": SMOOTHING.get(loss_type, 0.0),
        "beta": 0.7,
        **by_length,
    }


# name -> (loss, specification, number of differentiable inputs, number of inputs, options)
PAIRS = {name: (dpo_loss, dpo_loss_ref, 2, 4, options_of(name)) for name in DPO_LOSS_TYPES} | {
    "sigmoid without smoothing": (dpo_loss, dpo_loss_ref, 2, 4, {}),
    "ipo of sums": (dpo_loss, dpo_loss_ref, 2, 4, {"loss_type": "ipo", "beta": 0.3}),
    "simpo": (simpo_loss, simpo_loss_ref, 2, 2, lengths()),
    "simpo with nll": (
        simpo_loss,
        simpo_loss_ref,
        2,
        2,
        {"alpha": 0.3, "label_smoothing": 0.1, "beta": 1.3, **lengths()},
    ),
    "orpo": (orpo_loss, orpo_loss_ref, 2, 2, {"beta": 0.4, "alpha": 0.8, **lengths()}),
    "cpo": (cpo_loss, cpo_loss_ref, 2, 2, {"label_smoothing": 0.1}),
    "cpo per token": (
        cpo_loss,
        cpo_loss_ref,
        2,
        2,
        {"alpha": 0.6, "chosen_lengths": lengths()["chosen_lengths"]},
    ),
}
KTO = {
    "kto": {"desirable_weight": 1.3, "undesirable_weight": 0.6, "beta": 0.4},
    "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired", "undesirable_weight": 2.0},
}


def logps(count, dtype=torch.float64, shape=(S,), scale=4.0, seed=0, device="cpu", trained=2):
    """Sums of log-probs, the policy's and the references' close together, the first `trained` with a
    gradient."""
    generator = torch.Generator().manual_seed(seed)
    both = -5 * scale + scale * torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
    tensors = [
        (both[i % 2] + noise[i] * scale / 4).clamp(max=-1e-2).to(dtype).to(device) for i in range(count)
    ]
    return [x.requires_grad_() if i < trained else x for i, x in enumerate(tensors)]


def labelled(dtype=torch.float64, device="cpu", seed=0):
    policy, reference = logps(2, dtype, seed=seed, device=device, trained=1)
    desirable = torch.tensor([True, False, False, True, True, False, True], device=device)
    return policy, reference, desirable, torch.tensor(0.3, dtype=dtype, device=device)


def moved(options, device):
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in options.items()
    }


def assert_same(found, expected, inputs, rtol=1e-12):
    """Every field, and the gradients of the loss for a random upstream gradient."""
    for name, a, b in zip(expected._fields, found, expected):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol, msg=lambda text, name=name: f"{name}: {text}")
        assert a.requires_grad == (name == "loss")
    upstream = torch.randn(
        expected.loss.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).to(expected.loss)
    grads, grads_expected = (
        torch.autograd.grad(x.loss, inputs, upstream, retain_graph=True) for x in (found, expected)
    )
    torch.testing.assert_close(grads, grads_expected, rtol=rtol, atol=rtol)
    # A second backward gives the same again.
    torch.testing.assert_close(torch.autograd.grad(found.loss, inputs, upstream), grads, rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", PAIRS)
def test_pairs_match_the_specification(device, name, reduction):
    loss, reference, trained, count, options = PAIRS[name]
    inputs = logps(count, device=device)
    options = moved(options, device) | {"reduction": reduction}
    assert_same(loss(*inputs, **options), reference(*inputs, **options), inputs[:trained])


@pytest.mark.parametrize("name", PAIRS)
def test_gradcheck_of_pairs(name):
    loss, _, trained, count, options = PAIRS[name]
    inputs = logps(count)
    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(
            lambda *x, r=reduction: loss(*x, *inputs[trained:], **options, reduction=r).loss, inputs[:trained]
        )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss_type", KTO)
def test_kto_matches_the_specification(device, loss_type, reduction):
    policy, reference, desirable, kl = labelled(device=device)
    options = KTO[loss_type] | {"reduction": reduction}
    assert_same(
        kto_loss(policy, reference, desirable, kl, **options),
        kto_loss_ref(policy, reference, desirable, kl, **options),
        [policy],
    )
    assert torch.autograd.gradcheck(lambda x: kto_loss(x, reference, desirable, kl, **options).loss, policy)


@pytest.mark.parametrize("center", [0.0, 0.01])
@pytest.mark.parametrize("with_margin", [False, True])
def test_reward_loss_matches_the_specification(device, center, with_margin):
    chosen, rejected, margin = logps(3, device=device)
    margin = margin.abs() if with_margin else None
    found, expected = (
        f(chosen, rejected, margin, center_coefficient=center) for f in (reward_loss, reward_loss_ref)
    )
    assert_same(found, expected, [chosen, rejected])
    assert torch.autograd.gradcheck(
        lambda c, r: reward_loss(c, r, margin, center_coefficient=center).loss, (chosen, rejected)
    )


@pytest.mark.parametrize("which", [0, 1], ids=["chosen", "rejected"])
@pytest.mark.parametrize("name", PAIRS)
def test_a_wrong_sign_in_a_derivative_is_seen(monkeypatch, name, which):
    """The comparison above fails for each derivative of each formula that is negated."""
    loss, reference, trained, count, options = PAIRS[name]
    key = {"simpo": "sigmoid", "cpo": "sigmoid", "orpo": "odds_ratio"}.get(name.split()[0], name.split()[0])
    entry = PAIR_LOSSES[key]

    def negated(*arguments):
        out = list(entry.formula(*arguments))
        out[1 + which] = -out[1 + which]
        return out

    monkeypatch.setitem(PAIR_LOSSES, key, entry._replace(formula=negated))
    inputs = logps(count)
    with pytest.raises(AssertionError):
        assert_same(loss(*inputs, **options), reference(*inputs, **options), inputs[:trained])


# The closed form of each loss at beta = 0.5, c = 2, r = -1 (x = 1.5, bc = 1, br = -0.5), smoothing 0.1 where
# it is taken, lengths 4 and 2 for sigmoid_norm (x = 0.5).
def _ls(x):
    return -math.log1p(math.exp(-x))


def _s(x):
    return 1 / (1 + math.exp(-x))


POINT = {
    "sigmoid": -0.9 * _ls(1.5) - 0.1 * _ls(-1.5),
    "hinge": 0.0,
    "ipo": 4.0,
    "robust": (-0.9 * _ls(1.5) + 0.1 * _ls(-1.5)) / 0.8,
    "exo_pair": _s(1.5) * (_ls(1.5) - math.log(0.9)) + _s(-1.5) * (_ls(-1.5) - math.log(0.1)),
    "nca_pair": -_ls(1) - 0.5 * _ls(-1) - 0.5 * _ls(0.5),
    "bco_pair": -_ls(1) - _ls(0.5),
    "sppo_hard": 1.0,
    "apo_zero": 1 - _s(1) + _s(-0.5),
    "apo_down": _s(1) + 1 - _s(1.5),
    "discopop": -_ls(1.5) * (1 - _s(30)) + math.exp(-1.5) * _s(30),
    "sigmoid_norm": -0.9 * _ls(0.5) - 0.1 * _ls(-0.5),
}


@pytest.mark.parametrize("loss_type", DPO_LOSS_TYPES)
def test_known_points(loss_type):
    point = [torch.tensor([x], dtype=torch.float64) for x in (-5.0, -9.0, -7.0, -8.0)]
    n = (
        {"chosen_lengths": torch.tensor([4]), "rejected_lengths": torch.tensor([2])}
        if loss_type == "sigmoid_norm"
        else {}
    )
    out = dpo_loss(
        *point, beta=0.5, loss_type=loss_type, label_smoothing=0.1 if loss_type in SMOOTHING else 0.0, **n
    )
    assert out.loss.item() == pytest.approx(POINT[loss_type], rel=1e-14, abs=1e-14)
    assert (out.chosen_rewards.item(), out.rejected_rewards.item()) == (1.0, -0.5), "rewards are of sums"


def test_known_points_without_a_reference():
    c, r, n = (torch.tensor([x], dtype=torch.float64) for x in (-2.0, -6.0, 1.0))
    four = {"chosen_lengths": (4 * n).long(), "rejected_lengths": (4 * n).long()}
    simpo = simpo_loss(c, r, beta=2.0, gamma=0.5, **four)
    assert simpo.loss.item() == pytest.approx(-_ls(2 * 1.0 - 0.5)) and simpo.chosen_rewards.item() == -1.0
    p, q = math.exp(-0.5), math.exp(-1.5)
    odds = math.log(p / (1 - p)) - math.log(q / (1 - q))
    orpo = orpo_loss(c, r, beta=0.1, **four)
    assert orpo.loss.item() == pytest.approx(
        0.5 - 0.1 * _ls(odds)
    ) and orpo.rejected_rewards.item() == pytest.approx(-0.15)
    assert cpo_loss(c, r, beta=0.5).loss.item() == pytest.approx(-_ls(2.0) + 2.0)
    assert cpo_loss(c, r, beta=0.5, chosen_lengths=four["chosen_lengths"]).loss.item() == pytest.approx(
        -_ls(2.0) + 0.5
    )


def test_identities(device):
    """The first loss of each stage, and losses that are others' special cases."""
    a, b, c, d = (x.detach() for x in logps(4, torch.float32, device=device))
    first = dpo_loss(a, b, a, b)
    assert first.loss.item() == pytest.approx(math.log(2), rel=1e-7)
    assert (first.chosen_rewards == 0).all() and (first.rejected_rewards == 0).all()
    desirable = a > b
    kl = kto_kl(a, a)
    assert kl == 0
    kto = kto_loss(a, a, desirable, kl)
    assert kto.loss == 0.5 and (kto.rewards == 0).all()
    zeros = torch.zeros(S, device=device)
    reward = reward_loss(zeros, zeros, center_coefficient=0.5)
    assert (
        reward.loss.item() == pytest.approx(math.log(2), rel=1e-7)
        and reward.mean_margin == 0
        and reward.accuracy == 0
    )

    plain = dpo_loss(a, b, c, d, reduction="none").loss
    assert torch.equal(dpo_loss(a, b, c, d, loss_type="robust", reduction="none").loss, plain)
    flipped = dpo_loss(b, a, d, c, reduction="none").loss
    smoothed = dpo_loss(a, b, c, d, label_smoothing=0.3, reduction="none").loss
    torch.testing.assert_close(smoothed, 0.7 * plain + 0.3 * flipped)
    robust = dpo_loss(a, b, c, d, loss_type="robust", label_smoothing=0.3, reduction="none").loss
    torch.testing.assert_close(
        0.7 * robust
        + 0.3 * dpo_loss(b, a, d, c, loss_type="robust", label_smoothing=0.3, reduction="none").loss,
        plain,
    )
    ones = {name: torch.ones_like(n) for name, n in lengths(device).items()}
    assert torch.equal(dpo_loss(a, b, c, d, loss_type="sigmoid_norm", reduction="none", **ones).loss, plain)
    torch.testing.assert_close(reward_loss(0.1 * (a - c), 0.1 * (b - d)).loss, plain.mean())
    reference_free = dpo_loss(a, b, zeros, zeros, beta=2.0).loss
    torch.testing.assert_close(simpo_loss(a, b, gamma=0.0, **ones).loss, reference_free)
    torch.testing.assert_close(cpo_loss(a, b, beta=2.0, alpha=0.0).loss, reference_free)
    apo = kto_loss(
        torch.cat([a, b]),
        torch.cat([c, d]),
        torch.arange(2 * S, device=device) < S,
        None,
        loss_type="apo_zero_unpaired",
    )
    torch.testing.assert_close(2 * apo.loss, dpo_loss(a, b, c, d, loss_type="apo_zero").loss)


def test_bco_takes_a_delta_through_the_references():
    """As the docstring says: -log s(reward_c - delta) - log s(delta - reward_r)."""
    a, b, c, d = (x.detach() for x in logps(4))
    beta, delta = 0.4, 0.6
    found = dpo_loss(a, b, c + delta / beta, d + delta / beta, beta=beta, loss_type="bco_pair").loss
    expected = -F.logsigmoid(beta * (a - c) - delta) - F.logsigmoid(delta - beta * (b - d))
    torch.testing.assert_close(found, expected.mean())


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_do_not_depend_on_their_batch(name):
    """Permuted pairs, and micro-batches weighted by their sizes, bitwise per pair."""
    loss, _, trained, count, options = PAIRS[name]
    inputs = [x.detach().float() for x in logps(count)]

    def part(index):
        picked = {
            name: value[index] if isinstance(value, torch.Tensor) else value
            for name, value in options.items()
        }
        parts = [x[index].requires_grad_(i < trained) for i, x in enumerate(inputs)]
        out = loss(*parts, **picked, reduction="none").loss
        return [out.detach(), *torch.autograd.grad(out.sum(), parts[:trained])], loss(
            *parts, **picked
        ).loss.detach()

    whole, mean = part(torch.arange(S))
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    for found, expected in zip(part(order)[0], whole):
        assert torch.equal(found, expected[order])
    (head, head_mean), (tail, tail_mean) = part(torch.arange(3)), part(torch.arange(3, S))
    for a, b, expected in zip(head, tail, whole):
        torch.testing.assert_close(torch.cat([a, b]), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close((3 * head_mean + (S - 3) * tail_mean) / S, mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*PAIRS, *KTO, "reward"])
def test_low_precision_is_no_worse_than_eager(no_worse_than_eager, device, name, dtype):
    """Per sequence and as a mean, values, rewards and gradients; the truth sees the rounded inputs. Upstream
    gradients are not 1."""
    if name in PAIRS:
        loss, reference, trained, count, options = PAIRS[name]
        inputs, fixed = logps(count, dtype, device=device), ()
    elif name in KTO:
        loss, reference, trained, options = kto_loss, kto_loss_ref, 1, KTO[name]
        *inputs, desirable, kl = labelled(dtype, device)
        fixed = (desirable, kl)
    else:
        loss, reference, trained, options = reward_loss, reward_loss_ref, 2, {"center_coefficient": 0.02}
        inputs, fixed = logps(2, dtype, device=device), ()

    def run(function, tensors, reduction):
        choice = {} if name == "reward" else {"reduction": reduction}
        out = function(*tensors, *fixed, **moved(options, device), **choice)
        upstream = (
            torch.linspace(-2, 3, S if reduction == "none" else 1, device=device)
            .to(out.loss)
            .view(out.loss.shape)
        )
        return [x.detach() for x in (*out, *torch.autograd.grad(out.loss, tensors[:trained], upstream))]

    for reduction in ("mean", *([] if name == "reward" else ["none"])):
        ours, eager = run(loss, inputs, reduction), run(reference, inputs, reduction)
        truth = run(
            reference, [x.detach().double().requires_grad_(x.requires_grad) for x in inputs], reduction
        )
        assert all(x.dtype == torch.float32 for x in ours[: len(ours) - trained]) and all(
            x.dtype == dtype for x in ours[-trained:]
        )
        for a, b, t in zip(ours, eager, truth):
            no_worse_than_eager(a, b, t, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*PAIRS, *KTO, "reward"])
def test_huge_margins(no_worse_than_eager, device, name, dtype):
    """Log-ratios of +-1e4 in every combination, and means that round to a probability of 1: as right as
    eager, gradients finite."""
    extremes = torch.tensor(
        [[-1e4, 0.0], [0.0, -1e4], [-1e4, -1e4], [0.0, 0.0], [-40.0, -1e-3], [-1e-3, -40.0], [-1e4, -9990.0]]
    ).T
    chosen, rejected = (x.to(dtype).to(device).requires_grad_() for x in extremes)
    zeros, ones = (
        torch.zeros_like(chosen).detach(),
        dict.fromkeys(("chosen_lengths", "rejected_lengths"), torch.ones(S, dtype=torch.int64)),
    )
    if name in PAIRS:
        loss, reference, trained, count, options = PAIRS[name]
        options = {key: ones.get(key, value) for key, value in options.items()}
        options |= {
            "beta": 0.05 if name == "orpo" else 1.0,
            "reduction": "none",
        }  # orpo's slope is beta / 1e-6, and fp16 ends at 65504
        cases = (
            [(chosen, rejected)]
            if count == 2
            else [(chosen, rejected, zeros, zeros), (chosen, rejected, zeros - 1e4, zeros - 1e4)]
        )
    elif name in KTO:
        loss, reference, trained, options = (
            kto_loss,
            kto_loss_ref,
            1,
            KTO[name] | {"reduction": "none", "beta": 1.0},
        )
        cases = [
            (x, zeros - y, torch.arange(S) % 2 == 0, torch.tensor(z))
            for x in (chosen, rejected)
            for y in (0, 1e4)
            for z in (0.0, 1e4)
        ]
        cases = [(*case[:2], *(x.to(device) for x in case[2:])) for case in cases]
    else:
        loss, reference, trained, options = reward_loss, reward_loss_ref, 2, {"center_coefficient": 0.01}
        cases = [(chosen, rejected), (rejected, chosen, zeros + 1)]
    for case in cases:
        wide = [
            x if x.dtype == torch.bool else x.detach().double().requires_grad_(x.requires_grad) for x in case
        ]
        results = []
        for function, inputs in ((loss, case), (reference, case), (reference, wide)):
            out = function(*inputs, **moved(options, device)).loss
            results.append([out.detach(), *torch.autograd.grad(out.sum(), inputs[:trained])])
        for ours, eager, truth in zip(*results):
            assert ours.isfinite().all()
            no_worse_than_eager(ours, eager, truth, name)


def test_confident_pairs_keep_their_digits(device):
    """-log s(x) = log(1 + e^-x) at x where 1 + e^-x rounds to 1, and ORPO's 1 - e^c at c near 0: relative,
    not absolute, errors."""
    x = torch.tensor([1.0, 5.0, 10.0, 15.0, 17.0, 21.0, 40.0, 80.0], device=device)
    found = dpo_loss(x, 0 * x, 0 * x, 0 * x, beta=1.0, reduction="none").loss
    torch.testing.assert_close(found.double(), torch.log1p((-x.double()).exp()), rtol=1e-5, atol=0)
    c, ones = -x / 1e4, {name: torch.ones(8, dtype=torch.int64, device=device) for name in lengths()}
    orpo, exact = (
        f(y, 0 * y - 3, alpha=0.0, reduction="none", **ones).loss
        for f, y in ((orpo_loss, c), (orpo_loss_ref, c.double()))
    )
    torch.testing.assert_close(orpo.double(), exact, rtol=1e-5, atol=0)


def test_a_nan_stays_where_it_is(device):
    for name, (loss, _, trained, count, options) in PAIRS.items():
        for which in range(count):
            inputs = logps(count, torch.float32, device=device)
            with torch.no_grad():
                inputs[which][2] = float("nan")
            out = loss(*inputs, **moved(options, device), reduction="none").loss
            assert out.isnan().nonzero().flatten().tolist() == [2], (name, which)
            for grad in torch.autograd.grad(out.sum(), inputs[:trained]):
                assert grad[torch.arange(S) != 2].isfinite().all()


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,)], ids=str)
def test_any_leading_shape(device, shape):
    inputs = logps(4, shape=shape, device=device)
    for loss_type in ("sigmoid", "sigmoid_norm"):
        options = options_of(loss_type, device, shape)
        each, mean = dpo_loss(*inputs, **options, reduction="none"), dpo_loss(*inputs, **options).loss
        assert each.loss.shape == each.chosen_rewards.shape == each.rejected_rewards.shape == shape
        torch.testing.assert_close(mean, each.loss.mean(), equal_nan=True)
        assert mean.isnan() == (shape == (0,))
        grads = torch.autograd.grad(each.loss.sum(), inputs[:2])
        assert grads[0].shape == shape
    unpaired = kto_loss(
        *inputs[:2],
        torch.ones(shape, dtype=torch.bool, device=device),
        inputs[0].new_zeros(()),
        reduction="none",
    )
    assert unpaired.loss.shape == unpaired.rewards.shape == shape
    reward = reward_loss(*inputs[:2])
    assert reward.loss.shape == reward.accuracy.shape == reward.mean_margin.shape == ()
    assert bool(reward.loss.isnan()) == bool(reward.accuracy.isnan()) == (shape == (0,))


def test_strides_mixed_dtypes_and_frozen_policies(device):
    inputs = logps(4, torch.float32, shape=(2, S), device=device)
    strided = [torch.stack([x.detach(), x.detach() * 0], -1)[..., 0].t().requires_grad_() for x in inputs]
    assert not strided[0].is_contiguous()
    found, expected = dpo_loss(*strided, reduction="none").loss.t(), dpo_loss(*inputs, reduction="none").loss
    assert torch.equal(found, expected)
    for a, b in zip(
        torch.autograd.grad(found.sum(), strided[:2]), torch.autograd.grad(expected.sum(), inputs[:2])
    ):
        assert torch.equal(a.t(), b)
    mixed = dpo_loss(inputs[0], inputs[1].bfloat16(), inputs[2].half(), inputs[3].double())
    assert (
        mixed.loss.dtype == torch.float64
        and [g.dtype for g in torch.autograd.grad(mixed.loss, inputs[:2])] == [torch.float32] * 2
    )
    frozen = dpo_loss(inputs[0], inputs[1].detach(), *(x.detach().requires_grad_() for x in inputs[2:]))
    frozen.loss.backward()
    assert inputs[0].grad is not None and inputs[1].grad is None
    with torch.no_grad():
        assert not dpo_loss(*inputs).loss.requires_grad


def test_references_margins_and_the_kl_get_no_gradient(device):
    a, b, c, d = logps(4, trained=4, device=device)
    kl = torch.tensor(0.5, dtype=torch.float64, device=device, requires_grad=True)
    total = (
        dpo_loss(a, b, c, d).loss + kto_loss(a, c, a > b, kl).loss + reward_loss(a, b, d).loss + kto_kl(a, c)
    )
    total.backward()
    assert a.grad is not None and b.grad is not None and c.grad is None and d.grad is None and kl.grad is None
    assert not kto_kl(a, c).requires_grad


def test_empty_completions_count_as_one_token():
    inputs = [torch.tensor([0.0]) for _ in range(4)]
    none = {"chosen_lengths": torch.tensor([0]), "rejected_lengths": torch.tensor([0])}
    assert dpo_loss(*inputs, loss_type="sigmoid_norm", **none).loss.item() == pytest.approx(math.log(2))
    assert simpo_loss(*inputs[:2], gamma=0.0, **none).loss.item() == pytest.approx(math.log(2))


def test_kto_kl(device):
    policy, reference = (x.detach() for x in logps(2, torch.bfloat16, device=device))
    expected = (policy.double() - reference.double()).mean()
    found, opposite = kto_kl(policy, reference), kto_kl(reference, policy)
    assert found.dtype == torch.float32 and found.shape == ()
    torch.testing.assert_close(found, expected.clamp(min=0).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(opposite, (-expected).clamp(min=0).float(), rtol=1e-6, atol=0)
    assert (found == 0) != (opposite == 0)
    assert kto_kl(policy[:0], reference[:0]).isnan()


def test_compiles_without_a_graph_break(device):
    inputs = logps(4, torch.float32, device=device)
    fixed = lengths(device)

    def everything(a, b, c, d):
        return [
            dpo_loss(a, b, c, d, label_smoothing=0.1),
            dpo_loss(a, b, c, d, loss_type="ipo", **fixed, reduction="none"),
            simpo_loss(a, b, **fixed),
            orpo_loss(a, b, **fixed),
            cpo_loss(a, b),
            kto_loss(torch.cat([a, b]), torch.cat([c, d]), torch.cat([a > c, b > d]), kto_kl(b, c)),
            reward_loss(a, b, c, center_coefficient=0.1),
        ]

    expected, found = everything(*inputs), torch.compile(everything, fullgraph=True)(*inputs)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(tuple(ours), tuple(theirs))
    for outs in (expected, found):
        outs.append(torch.autograd.grad(sum(out.loss.sum() for out in outs), inputs[:2]))
    torch.testing.assert_close(found[-1], expected[-1])


def test_opcheck():
    ops = torch.ops.fastalign
    a, b, c, d = logps(4, torch.float32)
    n = lengths()
    for inputs in (
        (a, b, c, d, None, None, "sigmoid", 0.1, 0.2, 0.0, 0.0),
        (a, b, None, None, n["chosen_lengths"], n["rejected_lengths"], "odds_ratio", 0.1, 0.0, 0.0, 1.0),
        (a.detach().half(), b.detach(), c.double(), d, n["chosen_lengths"], None, "ipo", 0.1, 0.0, 0.3, 1.0),
    ):
        torch.library.opcheck(ops.preference_pairs.default, inputs)
    torch.library.opcheck(ops.preference_unpaired.default, (a, c, a > b, torch.tensor(0.5), 0.1, 1.0, 2.0))
    torch.library.opcheck(ops.preference_unpaired.default, (a, c, a > b, None, 0.1, 1.0, 2.0))
    torch.library.opcheck(ops.preference_scores.default, (a, b, c, 0.1))
    torch.library.opcheck(ops.preference_scores.default, (a, b, None, 0.0))


@pytest.fixture
def through_triton(monkeypatch):
    """The public functions on Triton's kernels: compiled on a GPU, interpreted on a CPU."""
    triton = pytest.importorskip(
        "fastalign_kernels.preference.losses_triton", reason="triton is not installed", exc_type=ImportError
    )
    monkeypatch.setattr(preference.KERNELS, "select", lambda losses: triton)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*PAIRS, *KTO, "reward"])
def test_triton_matches_its_twin(monkeypatch, no_worse_than_eager, through_triton, device, name, dtype):
    test_low_precision_is_no_worse_than_eager(no_worse_than_eager, device, name, dtype)


@pytest.mark.parametrize("name", [*PAIRS, *KTO, "reward"])
def test_triton_at_huge_margins(no_worse_than_eager, through_triton, device, name):
    test_huge_margins(no_worse_than_eager, device, name, torch.float32)


def test_triton_at_the_edges(through_triton, device):
    """Several programs with a ragged last one, empty batches, NaN, small losses."""
    inputs = logps(4, torch.float32, shape=(300,), device=device)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    found, expected = dpo_loss(*inputs, reduction="none"), dpo_loss_ref(*wide, reduction="none")
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=1e-6)
    grads, grads_expected = (
        torch.autograd.grad(o.loss.sum(), x[:2]) for o, x in ((found, inputs), (expected, wide))
    )
    torch.testing.assert_close(grads, tuple(g.float() for g in grads_expected), rtol=1e-5, atol=1e-7)
    test_a_nan_stays_where_it_is(device)
    test_confident_pairs_keep_their_digits(device)
    assert (
        dpo_loss(*(x[:0] for x in inputs)).loss.isnan()
        and reward_loss(inputs[0][:0], inputs[1][:0]).loss.isnan()
    )


ZEROS, LONG = torch.zeros(S), torch.ones(S, dtype=torch.int64)
DPO_REFUSALS = [
    (
        {"policy_rejected_logps": torch.zeros(3)},
        r"policy_rejected_logps: shape \[3\] seen, the shape of policy_chosen_logps = \[7\] wanted",
    ),
    ({"reference_chosen_logps": torch.zeros(1)}, r"reference_chosen_logps: shape \[1\] seen"),
    ({"reference_rejected_logps": LONG}, r"reference_rejected_logps: torch.int64 seen, torch.float32 or"),
    (
        {"policy_rejected_logps": torch.zeros(S, device="meta")},
        r"policy_rejected_logps: on meta, but policy_chosen_logps is on cpu",
    ),
    ({"beta": 0.0}, r"beta: 0.0 seen, a number above 0 wanted"),
    ({"beta": float("nan")}, r"beta: nan seen"),
    ({"loss_type": "kto"}, r"loss_type: 'kto' seen, one of sigmoid, hinge"),
    ({"loss_type": "odds_ratio"}, r"loss_type: 'odds_ratio' seen"),
    ({"reduction": "avg"}, r"reduction: 'avg' seen, one of mean, sum, none wanted"),
    ({"label_smoothing": 0.5}, r"label_smoothing: 0.5 seen with loss_type='sigmoid', \[0, 0.5\) wanted"),
    ({"label_smoothing": -0.1}, r"label_smoothing: -0.1 seen"),
    ({"loss_type": "exo_pair"}, r"label_smoothing: 0.0 seen with loss_type='exo_pair', \(0, 0.5\) wanted"),
    ({"loss_type": "robust", "label_smoothing": 0.5}, r"label_smoothing: 0.5 seen with loss_type='robust'"),
    (
        {"loss_type": "hinge", "label_smoothing": 0.1},
        r"label_smoothing: 0.1 seen with loss_type='hinge', 0 wanted",
    ),
    ({"chosen_lengths": LONG}, r"chosen_lengths: given with loss_type='sigmoid'"),
    (
        {"loss_type": "sigmoid_norm"},
        r"chosen_lengths: None seen with loss_type='sigmoid_norm', both lengths \[S\] wanted",
    ),
    ({"loss_type": "ipo", "chosen_lengths": LONG}, r"rejected_lengths: None seen with loss_type='ipo'"),
    (
        {"loss_type": "ipo", "chosen_lengths": LONG, "rejected_lengths": ZEROS},
        r"rejected_lengths: torch.float32 seen, torch.int64 or",
    ),
    (
        {"loss_type": "ipo", "chosen_lengths": LONG[:3], "rejected_lengths": LONG},
        r"chosen_lengths: shape \[3\] seen",
    ),
    (
        {"loss_type": "ipo", "chosen_lengths": -LONG, "rejected_lengths": LONG},
        r"chosen_lengths: -1 seen, values >= 0 wanted",
    ),
]


@pytest.mark.parametrize(
    "change, named", DPO_REFUSALS, ids=lambda v: " ".join(v) if isinstance(v, dict) else ""
)
def test_dpo_refusals_name_the_argument(change, named):
    names = (
        "policy_chosen_logps",
        "policy_rejected_logps",
        "reference_chosen_logps",
        "reference_rejected_logps",
    )
    with pytest.raises(ValueError, match=named):
        dpo_loss(**dict.fromkeys(names, ZEROS) | change)


@pytest.mark.parametrize(
    "call, named",
    [
        (lambda: kto_loss(ZEROS, ZEROS, LONG, ZEROS[0]), r"desirable: torch.int64 seen, torch.bool wanted"),
        (lambda: kto_loss(ZEROS, ZEROS, LONG[:2] > 0, ZEROS[0]), r"desirable: shape \[2\] seen"),
        (lambda: kto_loss(ZEROS, ZEROS[:2], LONG > 0, ZEROS[0]), r"reference_logps: shape \[2\] seen"),
        (lambda: kto_loss(ZEROS, ZEROS, LONG > 0, None), r"kl: None seen"),
        (lambda: kto_loss(ZEROS, ZEROS, LONG > 0, ZEROS), r"kl: shape \[7\] seen, a scalar = \[\] wanted"),
        (lambda: kto_loss(ZEROS, ZEROS, LONG > 0, torch.tensor(-0.5)), r"kl: -0.5 seen, values >= 0 wanted"),
        (lambda: kto_loss(ZEROS, ZEROS, LONG > 0, LONG[0]), r"kl: torch.int64 seen"),
        (
            lambda: kto_loss(ZEROS, ZEROS, LONG > 0, ZEROS[0], desirable_weight=-1.0),
            r"desirable_weight: -1.0 seen, a number >= 0 wanted",
        ),
        (
            lambda: kto_loss(ZEROS, ZEROS, LONG > 0, ZEROS[0], undesirable_weight=-1.0),
            r"undesirable_weight: -1.0 seen",
        ),
        (
            lambda: kto_loss(ZEROS, ZEROS, LONG > 0, ZEROS[0], loss_type="bco"),
            r"loss_type: 'bco' seen, one of kto, apo_zero_unpaired wanted",
        ),
        (lambda: kto_loss(ZEROS, ZEROS, LONG > 0, ZEROS[0], beta=-1.0), r"beta: -1.0 seen"),
        (lambda: kto_loss(ZEROS, ZEROS, LONG > 0, ZEROS[0], reduction="x"), r"reduction: 'x' seen"),
        (lambda: kto_kl(ZEROS, ZEROS[:1]), r"reference_mismatched_logps: shape \[1\] seen"),
        (lambda: kto_kl(LONG, ZEROS), r"policy_mismatched_logps: torch.int64 seen"),
        (lambda: reward_loss(ZEROS, ZEROS[:1]), r"rejected_scores: shape \[1\] seen"),
        (lambda: reward_loss(ZEROS, ZEROS, LONG), r"margin: torch.int64 seen"),
        (
            lambda: reward_loss(ZEROS, ZEROS, center_coefficient=-1.0),
            r"center_coefficient: -1.0 seen, a number >= 0 wanted",
        ),
        (
            lambda: simpo_loss(ZEROS, ZEROS, **lengths() | {"chosen_lengths": None}),
            r"chosen_lengths: None seen",
        ),
        (lambda: simpo_loss(ZEROS, ZEROS, **lengths(), beta=0.0), r"beta: 0.0 seen"),
        (lambda: simpo_loss(ZEROS, ZEROS, **lengths(), alpha=-1.0), r"alpha: -1.0 seen"),
        (
            lambda: orpo_loss(ZEROS, ZEROS, **lengths() | {"rejected_lengths": None}),
            r"rejected_lengths: None seen",
        ),
        (lambda: cpo_loss(ZEROS, ZEROS, label_smoothing=0.7), r"label_smoothing: 0.7 seen"),
    ],
)
def test_refusals_name_the_argument(call, named):
    with pytest.raises(ValueError, match=named):
        call()


# Two gloo ranks, in processes of their own that run this file; the second has fewer sequences than the first,
# then none.


def mismatched(case, rank):
    policy, reference = (x.detach() for x in logps(2, torch.float32, seed=5))
    cut = {"uneven": 5, "empty": S}[case]
    return [
        (x + shift)[:cut] if rank == 0 else (x + shift)[cut:]
        for x, shift in ((policy, 3.0), (reference, 0.0))
    ]


def test_kto_kl_over_two_ranks(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path)]
    ranks = [
        subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for case in ("uneven", "empty"):
        both = [torch.cat(parts) for parts in zip(mismatched(case, 0), mismatched(case, 1))]
        expected = kto_kl(*both)
        assert expected > 0
        for result in results:
            torch.testing.assert_close(result[case], expected, rtol=1e-6, atol=0)
        assert results[0]["clamped"] == results[1]["clamped"] == 0


def run_rank(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    result = {case: kto_kl(*mismatched(case, rank), group=dist.group.WORLD) for case in ("uneven", "empty")}
    # The clamp comes after the mean over ranks: 1 and -3 make 0, not 1/2.
    shift = torch.tensor([[1.0], [-3.0]])[rank]
    result["clamped"] = kto_kl(shift, torch.zeros(1), group=dist.group.WORLD)
    torch.save(result, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]), int(sys.argv[2]))
    # Not by return: gloo's threads can end the process while the interpreter shuts down
    # (tests/models/test_causal_lm.py).
    sys.stderr.flush()
    os._exit(0)


@pytest.mark.parametrize("twin", ["pytorch", "triton"])
def test_a_chosen_completion_without_probability_has_the_loss_of_the_formula(monkeypatch, device, twin):
    """0 times its infinite NLL was NaN."""
    if twin == "triton":
        triton = pytest.importorskip(
            "fastalign_kernels.preference.losses_triton",
            reason="triton is not installed",
            exc_type=ImportError,
        )
        monkeypatch.setattr(preference.KERNELS, "select", lambda losses: triton)
    chosen, rejected = torch.tensor([-math.inf], device=device), torch.tensor([-3.0], device=device)
    assert dpo_loss(chosen, rejected, rejected, rejected, loss_type="apo_zero").loss == 1.5
