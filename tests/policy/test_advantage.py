"""GAE against closed forms and PPO's loop over time; whitening, also over two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastalign_kernels import native
from fastalign_kernels.policy import advantages as advantage
from fastalign_kernels.policy.advantages import gae, masked_whiten
from fastalign_kernels.policy.reference import gae_ref, masked_whiten_ref
from tests import marks
from tests.two_ranks import be_a_rank, run_as_two_ranks

pytestmark = marks.KERNELS

NAN, INF = float("nan"), float("inf")


def episodes(dtype=torch.float64, shape=(9, 53), seed=0, device="cpu"):
    """Prompts before, padding after and gaps between the tokens, a row without tokens and a full one; garbage
    outside of the mask."""
    generator = torch.Generator().manual_seed(seed)
    B, T = shape
    rewards, values = torch.randn(2, B, T, generator=generator, dtype=torch.float64)
    begin, end = (
        torch.randint(0, T // 2 + 1, (B, 1), generator=generator),
        torch.randint(T // 2, T + 1, (B, 1), generator=generator),
    )
    t = torch.arange(T)
    mask = (t >= begin) & (t < end) & (torch.rand(B, T, generator=generator) > 0.2)
    mask[1:2], mask[2:3] = False, True
    rewards[~mask], values[~mask] = NAN, INF
    bootstrap = torch.randn(B, generator=generator, dtype=torch.float64)
    return [
        x.to(device) if x.dtype == torch.bool else x.to(dtype).to(device)
        for x in (rewards, values, mask, bootstrap)
    ]


@pytest.fixture(params=["chosen", "pytorch", "triton"])
def implementation(request, monkeypatch):
    """What a CPU or a GPU runs, PyTorch in its place, and Triton's kernels with blocks of 16: compiled on a
    GPU, else interpreted."""
    other = advantage.KERNELS.reference
    if request.param == "triton":
        other = pytest.importorskip(
            "fastalign_kernels.policy.advantages_triton",
            reason="triton is not installed",
            exc_type=ImportError,
        )
        monkeypatch.setattr(other, "BLOCK_SIZE", 16)
    if request.param != "chosen":
        monkeypatch.setattr(advantage.KERNELS, "select", lambda values: other)
    return request.param


def loop(rewards, values, mask, gamma, lam, bootstrap):
    """Row by row over the tokens inside the mask, in Python's fp64."""
    advantages = torch.zeros(mask.shape, dtype=torch.float64)
    for b in range(mask.shape[0]):
        following, running = 0.0 if bootstrap is None else bootstrap[b].item(), 0.0
        for t in reversed(mask[b].nonzero()[:, 0].tolist()):
            value = values[b, t].item()
            running = rewards[b, t].item() + gamma * following - value + gamma * lam * running
            following = value
            advantages[b, t] = running
    return advantages


@pytest.mark.parametrize("cut_off", [False, True])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.97, 0.8), (0.9, 0.0), (0.9, 1.0), (0.0, 0.5)])
def test_gae_matches_a_loop_in_fp64(gamma, lam, cut_off):
    rewards, values, mask, bootstrap = episodes()
    after = bootstrap if cut_off else None
    found, expected = (
        f(rewards, values, mask, gamma=gamma, lam=lam, bootstrap=after) for f in (gae, gae_ref)
    )
    truth = loop(rewards, values, mask, gamma, lam, after)
    for out in (found, expected):
        torch.testing.assert_close(out.advantages, truth, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            out.returns, torch.where(mask, truth + values, 0.0), rtol=1e-12, atol=1e-12
        )
        assert (
            not out.advantages[~mask].any() and not out.returns[~mask].any() and not out.returns.requires_grad
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gae_is_no_worse_than_eager(implementation, no_worse_than_eager, device, dtype):
    given = episodes(dtype, device=device)
    wide = [x if x.dtype == torch.bool else x.double() for x in given]
    for after in (slice(3), slice(4)):
        options = {"gamma": 0.98, "lam": 0.9}
        results = []
        for function, inputs in ((gae, given), (gae_ref, given), (gae_ref, wide)):
            *three, bootstrap = inputs[after] if after.stop == 4 else [*inputs[after], None]
            results.append(function(*three, bootstrap=bootstrap, **options))
        for name, ours, eager, truth in zip(results[0]._fields, *results):
            assert ours.dtype == torch.float32
            no_worse_than_eager(ours, eager, truth, name)
            assert not ours[~given[2]].any()


def test_lambda_1_and_0(implementation, device):
    """lambda 1: discounted rewards to come less the value; lambda 0: one step's error. Tokens apart from each
    other, in one row."""
    rewards, values = (
        torch.tensor([[9.0, 1, 9, 2, 3, 9]], device=device),
        torch.tensor([[9.0, 4, 9, 5, 6, 9]], device=device),
    )
    mask, bootstrap = torch.tensor([[0, 1, 0, 1, 1, 0]], device=device), torch.tensor([8.0], device=device)
    monte_carlo = gae(rewards, values, mask, gamma=0.5, lam=1.0, bootstrap=bootstrap)
    to_come = [1 + 0.5 * 2 + 0.25 * 3 + 0.125 * 8, 2 + 0.5 * 3 + 0.25 * 8, 3 + 0.5 * 8]
    assert monte_carlo.returns[mask > 0].tolist() == pytest.approx(to_come)
    assert monte_carlo.advantages[mask > 0].tolist() == pytest.approx(
        [to_come[0] - 4, to_come[1] - 5, to_come[2] - 6]
    )
    one_step = gae(rewards, values, mask, gamma=0.5, lam=0.0)
    assert one_step.advantages[mask > 0].tolist() == pytest.approx([1 + 2.5 - 4, 2 + 3 - 5, 3 - 6])
    assert not one_step.advantages[mask == 0].any() and not one_step.returns[mask == 0].any()


def test_padding_does_not_matter(implementation, device):
    """A row alone, behind a prompt, before padding and with gaps has the same advantages."""
    rewards, values = torch.randn(2, 1, 7, generator=torch.Generator().manual_seed(0)).to(device)
    alone = gae(rewards, values, torch.ones(1, 7, device=device, dtype=torch.bool), gamma=0.9)
    at = torch.tensor([4, 5, 8, 15, 16, 32, 40], device=device)
    wide, mask = (
        torch.full((2, 1, 50), NAN, device=device),
        torch.zeros(1, 50, dtype=torch.bool, device=device),
    )
    wide[0][:, at], wide[1][:, at], mask[:, at] = rewards, values, True
    spread = gae(*wide, mask, gamma=0.9)
    torch.testing.assert_close(spread.advantages[:, at], alone.advantages, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (5, 16), (6, 17), (2, 33)], ids=str)
def test_gae_of_any_shape(implementation, device, shape):
    rewards, values, mask, bootstrap = episodes(torch.float32, shape, device=device)
    found = gae(rewards, values, mask, bootstrap=bootstrap)
    assert found.advantages.shape == found.returns.shape == shape
    if 0 not in shape:
        torch.testing.assert_close(
            tuple(found), tuple(gae_ref(rewards, values, mask, bootstrap=bootstrap)), rtol=1e-5, atol=1e-5
        )


def test_gae_strides_masks_of_integers_and_dtypes(device):
    rewards, values, mask, bootstrap = episodes(torch.float32, device=device)
    expected = gae(rewards, values, mask, bootstrap=bootstrap)
    strided = [x.t().contiguous().t() for x in (rewards, values, mask)]
    assert not strided[2].is_contiguous()
    assert all(map(torch.equal, gae(*strided, bootstrap=torch.stack([bootstrap] * 2, 1)[:, 0]), expected))
    assert all(map(torch.equal, gae(rewards, values, mask.long() * 2, bootstrap=bootstrap), expected))
    mixed = gae(rewards.bfloat16().double(), values.requires_grad_(), mask)
    assert mixed.advantages.dtype == torch.float64 and not mixed.returns.requires_grad


def test_any_number_of_threads_gives_the_same_bits():
    if native.missing:
        pytest.skip(native.missing)
    rewards, values, mask, bootstrap = episodes(torch.float32, (33, 70))
    tokens = torch.randn(70_001, generator=torch.Generator().manual_seed(0))
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            results.append(
                (*gae(rewards, values, mask, bootstrap=bootstrap), masked_whiten(tokens, tokens > -1))
            )
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))
    rows = [
        gae(*(x[i : i + 1] for x in (rewards, values, mask)), bootstrap=bootstrap[i : i + 1]).advantages
        for i in range(33)
    ]
    assert torch.equal(torch.cat(rows), results[0][0]), "a row does not depend on its batch"


def test_opcheck_and_compile():
    rewards, values, mask, bootstrap = episodes(torch.float32)
    torch.library.opcheck(
        advantage.gae_op, (rewards.nan_to_num(), values.nan_to_num(posinf=0), mask, bootstrap, 0.9, 0.8)
    )
    torch.library.opcheck(
        advantage.gae_op, (rewards.nan_to_num(), values.nan_to_num(posinf=0).half(), mask, None, 0.9, 0.8)
    )
    torch.library.opcheck(advantage.moments_op, (rewards.nan_to_num(), mask))
    moments = torch.tensor([9.0, 0.5, 4.0], dtype=torch.float64)
    torch.library.opcheck(advantage.whiten_op, (rewards.nan_to_num(), mask, moments, False, 1e-8))

    def both(*given):
        out = gae(*given, lam=0.9)
        return *out, masked_whiten(out.advantages, given[2])

    for found, expected in zip(
        torch.compile(both, fullgraph=True, backend="aot_eager")(rewards, values, mask),
        both(rewards, values, mask),
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"rewards": torch.zeros(3)}, r"rewards: got shape \[3\], expected \[B, T\]"),
        (
            {"values": torch.zeros(2, 4)},
            r"values: got shape \[2, 4\], expected the shape of rewards = \[2, 3\]",
        ),
        ({"values": torch.zeros(2, 3, dtype=torch.int64)}, r"values: got torch.int64"),
        ({"mask": torch.full((2, 3), 0.5)}, "mask: got 0.5, expected 0 or 1 for each token"),
        ({"bootstrap": torch.zeros(3)}, r"bootstrap: got shape \[3\], expected \[B\] = \[2\]"),
        ({"bootstrap": torch.zeros(2, dtype=torch.bool)}, r"bootstrap: got torch.bool"),
        (
            {"bootstrap": torch.zeros(2, device="meta")},
            r"bootstrap: got a tensor on meta, expected cpu, where rewards is",
        ),
        ({"gamma": 1.1}, r"gamma: got 1.1, expected a number in \[0, 1\]"),
        ({"lam": -0.1}, r"lam: got -0.1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_gae_refusals_name_the_argument(change, named):
    given = {
        "rewards": torch.zeros(2, 3),
        "values": torch.zeros(2, 3),
        "mask": torch.ones(2, 3, dtype=torch.bool),
    }
    with pytest.raises(ValueError, match=named):
        gae(**given | change)


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_whitening_is_no_worse_than_eager(implementation, no_worse_than_eager, device, dtype, shift_mean):
    x, _, mask, _ = episodes(dtype, device=device)
    x = x * 3 + 100
    found, eager, truth = (
        masked_whiten(x, mask, shift_mean=shift_mean),
        masked_whiten_ref(x, mask, shift_mean=shift_mean),
        masked_whiten_ref(x.double(), mask, shift_mean=shift_mean),
    )
    no_worse_than_eager(found, eager, truth, str(dtype))
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    inside = found[mask].double()
    assert inside.mean().item() == pytest.approx(
        0 if shift_mean else x[mask].double().mean().item(), abs=1e-5
    )
    assert inside.var().item() == pytest.approx(1, rel=1e-4)
    assert not found[~mask].any(), "TRL's trainer sets padding to 0 in the line after"


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 2047, 2049, 5003])
def test_whitening_of_blocks_far_from_zero(implementation, device, tokens):
    """Packed tokens around 1e4, blocks at 1e4 and 2e4 among them: what fp32 sums of squares would have
    lost."""
    generator = torch.Generator().manual_seed(tokens)
    x = 1e4 + torch.randn(tokens, generator=generator) + 1e4 * (torch.arange(tokens) >= 2048)
    mask = (torch.rand(tokens, generator=generator) > 0.3) | (torch.arange(tokens) < 1)
    truth = masked_whiten_ref(x.double(), mask)
    found = masked_whiten(torch.where(mask, x, NAN).to(device), mask.to(device)).cpu()
    torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=1e-6)


def test_whitening_shows_what_is_not_finite_inside_the_mask(implementation, device):
    x = torch.tensor([1.0, 2.0, NAN, 4.0], device=device)
    assert masked_whiten(x, x == x).isfinite().all()
    assert masked_whiten(x, torch.ones_like(x, dtype=torch.bool)).isnan().all()


def test_whitening_strides_and_masks_of_integers(device):
    x, _, mask, _ = episodes(torch.float32, device=device)
    expected = masked_whiten(x, mask)
    assert torch.equal(masked_whiten(x.t().contiguous().t(), mask.t().contiguous().t()), expected)
    assert torch.equal(masked_whiten(x, mask.int() * 2), expected)
    assert torch.equal(masked_whiten(x.flatten(), mask.flatten()), expected.flatten())
    for shape in ((0,), (0, 4), (3, 0)):
        assert masked_whiten(x.new_empty(shape), mask.new_empty(shape)).shape == shape


def test_whitening_of_little(implementation, device):
    x = torch.tensor([[5.0, NAN, 7.0]], device=device)
    one = masked_whiten(x, torch.tensor([[1, 0, 0]], device=device))
    assert one.tolist() == [[0, 0, 0]]
    assert masked_whiten(x, torch.zeros(1, 3, dtype=torch.bool, device=device)).tolist() == [[0, 0, 0]]
    two = masked_whiten(x.requires_grad_(), torch.tensor([[1, 0, 1]], device=device))
    assert two.flatten().tolist() == pytest.approx([-(0.5**0.5), 0, 0.5**0.5]) and not two.requires_grad
    same = torch.full((4,), 1e4, device=device)
    assert not masked_whiten(same, same > 0).any()


def test_whitening_refusals_name_the_argument():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"mask: got shape \[3\], expected the shape of x"):
        masked_whiten(x, torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"eps: got -1, expected a number >= 0"):
        masked_whiten(x, x == 0, eps=-1)


# Two gloo ranks, in processes of their own that run this file; the second has fewer rows than the first, then
# none.


def shared(case, rank):
    x, _, mask, _ = episodes(torch.float32)
    x = 1e4 + x.nan_to_num(0)
    cut = {"uneven": 6, "empty": 9}[case]
    return (x[:cut], mask[:cut]) if rank == 0 else (x[cut:] + 3, mask[cut:])


def test_whitening_over_two_ranks(tmp_path):
    run_as_two_ranks(__file__, tmp_path)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for case in ("uneven", "empty"):
        x, mask = (torch.cat(parts) for parts in zip(shared(case, 0), shared(case, 1)))
        found = torch.cat([result[case] for result in results])
        torch.testing.assert_close(found, masked_whiten(x, mask), rtol=1e-6, atol=1e-6)
        inside = found[mask].double()
        assert abs(inside.mean().item()) < 1e-6 and inside.var().item() == pytest.approx(1, rel=1e-5)


def run_rank(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    torch.save(
        {case: masked_whiten(*shared(case, rank), group=dist.group.WORLD) for case in ("uneven", "empty")},
        folder / f"{rank}.pt",
    )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    be_a_rank(run_rank)
