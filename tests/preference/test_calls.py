"""Calls of the preference losses: shapes, strides, gradients, compilation, and kto_kl over ranks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastalign_kernels.preference.losses import (
    cpo_loss,
    dpo_loss,
    kto_kl,
    kto_loss,
    orpo_loss,
    reward_loss,
    simpo_loss,
)
from tests import marks
from tests.preference.sequence_losses import S, lengths, logps, options_of
from tests.two_ranks import be_a_rank, run_as_two_ranks

pytestmark = marks.KERNELS


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
        (a, b, c, d, None, None, "sigmoid", [0.1, 0.2, 0.0, 0.0, 0]),
        (a, b, None, None, n["chosen_lengths"], n["rejected_lengths"], "odds_ratio", [0.1, 0.0, 0.0, 1.0, 1]),
        (
            a.detach().half(),
            b.detach(),
            c.double(),
            d,
            n["chosen_lengths"],
            None,
            "ipo",
            [0.1, 0.0, 0.3, 1.0, 2],
        ),
    ):
        torch.library.opcheck(ops.preference_pairs.default, inputs)
    torch.library.opcheck(
        ops.preference_unpaired.default, (a, c, a > b, torch.tensor(0.5), [0.1, 1.0, 2.0, 0])
    )
    torch.library.opcheck(ops.preference_unpaired.default, (a, c, a > b, None, [0.1, 1.0, 2.0, 2]))
    torch.library.opcheck(ops.preference_scores.default, (a, b, c, 0.1))
    torch.library.opcheck(ops.preference_scores.default, (a, b, None, 0.0))


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
    run_as_two_ranks(__file__, tmp_path)
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
    be_a_rank(run_rank)
