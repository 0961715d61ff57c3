"""Preference losses in low precision, at huge margins and at NaN, by each implementation."""

from __future__ import annotations

import math

import pytest
import torch

from fastalign_kernels.preference import ops as preference
from fastalign_kernels.preference.losses import (
    dpo_loss,
    kto_loss,
    orpo_loss,
    reward_loss,
)
from fastalign_kernels.preference.reference import (
    dpo_loss_ref,
    kto_loss_ref,
    orpo_loss_ref,
    reward_loss_ref,
)
from tests import marks
from tests.preference.sequence_losses import KTO, PAIRS, S, labelled, lengths, logps, moved

pytestmark = marks.KERNELS


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


def test_infinite_margins(device):
    """A completion of probability 0 makes the loss 0 where it is the rejected one, else infinite: an option
    at 0 multiplies no infinity."""
    impossible = torch.tensor([-math.inf, -3.0], device=device)
    other = impossible.flip(0)
    fixed = (torch.zeros_like(impossible),) * 2
    ones = {name: torch.ones(2, dtype=torch.int64, device=device) for name in lengths()}
    for loss in (dpo_loss, dpo_loss_ref):
        for loss_type in ("sigmoid", "robust", "sigmoid_norm"):
            given = {"loss_type": loss_type, **(ones if loss_type == "sigmoid_norm" else {})}
            plain = loss(impossible, other, *fixed, **given, reduction="none").loss
            assert plain.tolist() == [math.inf, 0.0], (loss, loss_type)
        smoothed = loss(impossible, other, *fixed, label_smoothing=0.1, reduction="none").loss
        assert smoothed.tolist() == [math.inf, math.inf]
    for of_scores in (reward_loss, reward_loss_ref):
        assert [of_scores(*pair).loss.item() for pair in zip(impossible[:, None], other[:, None])] == [
            math.inf,
            0.0,
        ]


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
    test_infinite_margins(device)
    assert (
        dpo_loss(*(x[:0] for x in inputs)).loss.isnan()
        and reward_loss(inputs[0][:0], inputs[1][:0]).loss.isnan()
    )


@pytest.mark.parametrize("S", [1, 300, 1024, 1030, 4097])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_triton_reduces_the_losses_of_any_number_of_pairs(through_triton, device, S, reduction):
    """One program's up to 4096, then torch's."""
    inputs = logps(4, torch.float32, shape=(S,), device=device)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    labels = torch.arange(S, device=device) % 3 == 0
    for loss, specification, arguments in (
        (dpo_loss, dpo_loss_ref, {"reduction": reduction}),
        (kto_loss, kto_loss_ref, {"reduction": reduction}),
        (reward_loss, reward_loss_ref, {"center_coefficient": 0.1}),
    ):
        results = []
        for function, (a, b, c, d) in ((loss, inputs), (specification, wide)):
            given = {dpo_loss: (a, b, c, d), kto_loss: (a, c, labels, d.mean().abs()), reward_loss: (a, b)}[
                loss
            ]
            out = function(*given, **arguments)
            results.append([*out, *torch.autograd.grad(0.3 * out.loss, a)])
        for found, expected in zip(*results):
            torch.testing.assert_close(found, expected.float(), rtol=2e-5, atol=1e-6)
