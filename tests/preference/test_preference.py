"""Losses of sequences against their specifications, closed forms and each other."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastalign_kernels.preference import ops as preference
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
    kto_loss_ref,
    reward_loss_ref,
)
from tests import marks
from tests.preference.sequence_losses import KTO, PAIRS, SMOOTHING, S, labelled, lengths, logps, moved

pytestmark = marks.KERNELS


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
