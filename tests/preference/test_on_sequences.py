"""The loss objects that a head calls have the values and gradients of the public losses."""

import pytest
import torch

from fastalign_kernels import dpo_loss, kto_loss
from fastalign_kernels.preference.on_sequences import PairLoss, UnpairedLoss

S = 5


def completions(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, rows, generator=generator) * 3 - 20
    return policy.requires_grad_(), reference


@pytest.mark.parametrize(
    "loss_type, takes_lengths", [("sigmoid", False), ("sigmoid_norm", True), ("ipo", True)]
)
def test_pairs_on_sequences_are_dpo_loss(loss_type: str, takes_lengths: bool) -> None:
    logps, reference = completions(2 * S)
    lengths = torch.arange(1, 2 * S + 1) if takes_lengths else None
    chosen, rejected = (None, None) if lengths is None else (lengths[:S], lengths[S:])
    expected = dpo_loss(
        logps[:S],
        logps[S:],
        reference[:S],
        reference[S:],
        beta=0.3,
        loss_type=loss_type,
        chosen_lengths=chosen,
        rejected_lengths=rejected,
        reduction="none",
    ).loss
    loss = PairLoss(reference, lengths, loss_type, beta=0.3, label_smoothing=0.0)
    losses, grads = loss.losses_and_grads(logps.detach())
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(grads, torch.autograd.grad(expected.mean(), logps)[0])


@pytest.mark.parametrize("kl", [None, torch.tensor(0.7)], ids=["without kl", "with kl"])
def test_completions_on_sequences_are_kto_loss(kl: torch.Tensor | None) -> None:
    logps, reference = completions(S)
    desirable = torch.tensor([True, False, False, True, True])
    expected = kto_loss(
        logps,
        reference,
        desirable,
        kl,
        beta=0.3,
        desirable_weight=1.5,
        undesirable_weight=0.5,
        loss_type="apo_zero_unpaired" if kl is None else "kto",
        reduction="none",
    ).loss
    loss = UnpairedLoss(reference, desirable, kl, beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    losses, grads = loss.losses_and_grads(logps.detach())
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(grads, torch.autograd.grad(expected.mean(), logps)[0])
