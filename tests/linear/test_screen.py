"""Screened logits: exact where they matter, near enough elsewhere, and exact for tokens that 8 bits do not
serve."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign_kernels import (
    linear_cross_entropy,
    linear_dpo_loss,
    linear_kto_loss,
    linear_logprobs,
    linear_ppo_loss,
    linear_token_stats,
    screen_counts,
)
from fastalign_kernels.linear import screen, screen_weight
from fastalign_kernels.linear.inputs import HeadInputs
from fastalign_kernels.linear.options import HeadOptions
from fastalign_kernels.linear.screen_reference import screened_stats_ref
from fastalign_kernels.linear.screen_weight import orthonormal, screened_weight
from fastalign_kernels.softmax.rows import Stat, Transform, row_stats_ref
from tests.linear.screen_inputs import Given, H, N, V, both, make, needs_screen

pytestmark = pytest.mark.usefixtures("small_vocabulary")


def check_near(exact: Any, screened: Any, allowed: float = 2e-3) -> None:
    for name in ("logp", "lse"):
        difference = (getattr(exact, name) - getattr(screened, name)).abs()
        assert difference.max() < allowed, name
    assert (exact.entropy - screened.entropy).abs().max() < 10 * allowed
    assert torch.equal(exact.top1, screened.top1)


TRANSFORMS: list[Given] = [
    {},
    {"temperature": 0.7},
    {"logit_scale": 0.8, "softcap": 30.0},
    {"logit_scale": -1.0},
]


@needs_screen
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", TRANSFORMS, ids=str)
def test_statistics_are_near_the_exact_ones_and_top1_is_exact(options: Given, dtype: torch.dtype) -> None:
    given = make(dtype)
    given["bias"] = 0.3 * torch.randn(V, generator=torch.Generator().manual_seed(3)).to(dtype)
    screen_counts()
    exact, screened = both(given, **options)
    check_near(exact, screened, 2e-3 if dtype == torch.float32 else 6e-3)
    counts = screen_counts()
    assert counts.tokens == N - 1 and counts.exact_tokens == 0
    assert N - 1 <= counts.exact_columns < N * V * (0.3 if options.get("logit_scale") != -1 else 0.8)
    assert screened.logp[1] == 0


@needs_screen
@pytest.mark.parametrize("options", TRANSFORMS, ids=str)
def test_the_tile_and_the_statistics_are_those_of_the_specification(options: Given) -> None:
    given = make(tokens=70)
    hidden, weight, ids = given["hidden"][2:], given["weight"], given["ids"][2:]
    transform = Transform(
        options.get("logit_scale", 1.0), options.get("softcap") or 0.0, options.get("temperature", 1.0)
    )
    reference = screened_stats_ref(hidden, weight, ids, None, transform)
    inputs = HeadInputs(hidden, weight, ids, None, HeadOptions(*transform, screen=True))
    tile = torch.full((68, V), torch.nan)
    stats, unresolved = screen.Screen(inputs, weight, None).run(hidden, ids, tile)
    assert not unresolved.numel()
    # a code may be rounded to either side, and a column lie on either side of the threshold
    assert (tile - reference.logits).abs().max() < 0.05
    exact = hidden @ weight.t()
    assert ((tile - exact).abs() < 1e-4)[reference.exact].double().mean() > 0.98
    torch.testing.assert_close(stats[Stat.LOGP], reference.stats[Stat.LOGP], rtol=0, atol=1e-3)
    # the statistics are those of the tile that lies in memory
    of_tile = row_stats_ref(tile[None], ids, None, transform)
    torch.testing.assert_close(stats, of_tile, rtol=2e-5, atol=2e-5)


@needs_screen
def test_the_same_bits_for_any_number_of_threads_and_any_split() -> None:
    given = make()
    whole = linear_logprobs(**given, screen=True)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(linear_logprobs(**given, screen=True), whole)
    finally:
        torch.set_num_threads(before)
    parts = [
        linear_logprobs(hidden, given["weight"], ids, screen=True)
        for hidden, ids in zip(given["hidden"].split([3, 70, 77]), given["ids"].split([3, 70, 77]))
    ]
    assert torch.equal(torch.cat(parts), whole)


def hostile(kind: str) -> Given:
    given = make()
    hidden, weight = given["hidden"], given["weight"]
    if kind == "an enormous coordinate":
        hidden[:, 7] = 3000.0
        weight[:, 7] *= 1e-3
    elif kind == "constant rows":
        hidden[:], weight[::2] = 1.0, 0.5
    elif kind == "logits of 1e4":
        hidden *= 1e4 / float((hidden @ weight.t()).abs().max())
    elif kind == "NaN in a token":
        hidden[5, 0] = torch.nan
    elif kind == "infinity in a token":
        hidden[5, 0] = torch.inf
    elif kind == "NaN in the weight":
        weight[9, 0] = torch.nan
    elif kind == "zeros":
        hidden[:] = 0
    elif kind == "two equal columns":
        weight[1], given["ids"][0] = weight[0], 1
        hidden[0] = 50 * weight[0]
    return given


KINDS = (
    *("an enormous coordinate", "constant rows", "logits of 1e4", "NaN in a token", "infinity in a token"),
    *("NaN in the weight", "zeros", "two equal columns"),
)


@needs_screen
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_inputs_are_right_or_exact(kind: str) -> None:
    exact, screened = both(hostile(kind))
    for name in ("logp", "lse", "entropy"):
        a, b = getattr(exact, name), getattr(screened, name)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-2, equal_nan=True)
    assert torch.equal(exact.top1, screened.top1)


@needs_screen
def test_tokens_that_8_bits_do_not_serve_are_exact_and_counted() -> None:
    given = make()
    given["hidden"][10:15] *= 1000
    screen_counts()
    exact, screened = both(given)
    counts = screen_counts()
    assert counts.exact_tokens == 5
    torch.testing.assert_close(exact.logp[10:15], screened.logp[10:15], rtol=1e-6, atol=1e-5)
    check_near(exact, screened)


@needs_screen
def test_a_call_that_8_bits_do_not_serve_is_exact_and_says_so() -> None:
    given = hostile("logits of 1e4")
    screen_counts()
    linear_logprobs(**given, screen=True)
    counts = screen_counts()
    assert counts.tokens == counts.exact_tokens == N - 1


@needs_screen
def test_a_call_to_which_many_columns_matter_is_exact_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "LARGEST_SHARE", 1 / 32)
    given = make()
    given["hidden"] *= 0.2
    screen_weight.forget_weights()
    screen_counts()
    exact, screened = both(given)
    counts = screen_counts()
    assert counts.tokens == counts.exact_tokens == N - 1
    assert not screen_weight._kept  # nor is the weight coded
    torch.testing.assert_close(exact.logp, screened.logp)


@needs_screen
def test_a_flat_softmax_over_many_columns_is_screened() -> None:
    """No column but the target and the largest matters."""
    generator = torch.Generator().manual_seed(0)
    given = {
        "hidden": 0.01 * torch.randn(70, 16, generator=generator),
        "weight": torch.randn(40000, 16, generator=generator),
        "ids": torch.randint(0, 40000, (70,), generator=generator),
    }
    screen_counts()
    exact, screened = both(given)
    counts = screen_counts()
    assert counts.exact_tokens == 0 and counts.exact_columns < 70 * 100
    check_near(exact, screened, 1e-4)


@needs_screen
def test_more_columns_that_matter_than_a_token_may_have_make_it_exact() -> None:
    weight = torch.zeros(9000, 64)
    weight[:, 0] = -20.0
    weight[:6000, 0] = 0.0
    hidden = torch.zeros(4, 64)
    hidden[:, 0] = 1.0
    ids = torch.tensor([0, 5999, 6000, 8999])
    screen_counts()
    exact, screened = both({"hidden": hidden, "weight": weight, "ids": ids})
    assert screen_counts().exact_tokens == 4
    torch.testing.assert_close(exact.logp, screened.logp)


@needs_screen
def test_masked_columns_have_no_mass() -> None:
    given = make()
    given["bias"] = torch.zeros(V)
    given["bias"][::3] = -torch.inf
    given["ids"] = torch.where(given["ids"] % 3 == 0, given["ids"] + 1, given["ids"]).clamp(max=V - 1)
    exact, screened = both(given)
    check_near(exact, screened)


def gradients(loss: Tensor, given: Given) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [given["hidden"], given["weight"]]))


def losses(given: Given, **options: Any) -> dict[str, Tensor]:
    """Each loss on the head, on a row of sequences."""
    hidden, weight, ids = given["hidden"], given["weight"], given["ids"]
    rows = hidden.view(2, -1, H), weight, ids.view(2, -1)
    mask = rows[2] >= 0
    zeros = torch.zeros(2, N // 2)
    return {
        "cross_entropy": linear_cross_entropy(hidden, weight, ids, **options),
        "logprobs": linear_logprobs(hidden, weight, ids, **options).sum() / N,
        "token_stats": linear_token_stats(hidden, weight, ids, **options).entropy.sum() / N,  # type: ignore[union-attr]
        "dpo": linear_dpo_loss(*rows, reference_logps=torch.zeros(2), **options).loss,
        "kto": linear_kto_loss(
            *rows,
            desirable=torch.tensor([True, False]),
            reference_logps=torch.full((2,), -20.0),
            kl=torch.tensor(0.0),
            **options,
        ).loss,
        "ppo": linear_ppo_loss(*rows, old_logp=zeros - 0.5, advantages=zeros - 1, mask=mask, **options).loss,
    }


LOSSES = ("cross_entropy", "logprobs", "token_stats", "dpo", "kto", "ppo")


@needs_screen
@pytest.mark.parametrize("tail_eps", [None, 2.0**-14])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_near_the_exact_ones(name: str, tail_eps: float | None) -> None:
    given = make()
    given["hidden"].requires_grad_()
    given["weight"].requires_grad_()
    exact = losses(given, tail_eps=tail_eps)[name]
    screened = losses(given, screen=True, tail_eps=tail_eps)[name]
    assert (exact - screened).abs() < 3e-3 * exact.abs().clamp(min=1.0)
    for a, b in zip(gradients(screened, given), gradients(exact, given)):
        assert (a - b).norm() < 0.02 * b.norm()


@needs_screen
def test_a_frozen_head_and_a_tail_take_a_screen() -> None:
    given = make()
    given["hidden"].requires_grad_()
    for tail_eps in (None, 2.0**-14):
        (exact,) = torch.autograd.grad(linear_logprobs(**given, tail_eps=tail_eps).sum(), given["hidden"])
        loss = linear_logprobs(**given, screen=True, tail_eps=tail_eps).sum()
        (screened,) = torch.autograd.grad(loss, given["hidden"])
        assert (exact - screened).norm() < 0.02 * exact.norm()


@needs_screen
def test_codes_are_kept_for_a_version_of_the_weight_alone() -> None:
    screen_weight.forget_weights()
    weight = make()["weight"]
    first = screened_weight(weight)
    assert screened_weight(weight.detach()) is first
    weight.mul_(2)
    second = screened_weight(weight)
    assert second is not first
    weight.data.mul_(2)  # changes no version
    assert screened_weight(weight) is not second
    assert screened_weight(weight[: V // 2]).rows.packed.numel() < first.rows.packed.numel()
    for _ in range(6):
        screened_weight(torch.randn(50, 16))  # its memory is freed, and may be taken again
    assert len(screen_weight._kept) <= screen_weight.MOST_WEIGHTS


@needs_screen
def test_a_row_that_changes_without_a_new_version_is_coded_anew() -> None:
    weight = make()["weight"]
    first = screened_weight(weight)
    weight.data[1234] += 1
    second = screened_weight(weight)
    assert second is not first
    # as FSDP2 gathers another step's weight; one element of one row
    with torch.autograd._unsafe_preserve_version_counter(weight):
        weight[77, 5] += 1
    assert screened_weight(weight) is not second


@needs_screen
def test_a_weight_made_in_inference_mode_is_coded_in_each_call() -> None:
    with torch.inference_mode():
        given = make()
        first = linear_logprobs(**given, screen=True)
        given["weight"].mul_(0.9)
        check_near(*both(given))
        assert not torch.equal(linear_logprobs(**given, screen=True), first)


@needs_screen
def test_a_weight_in_the_memory_of_another_is_coded_anew() -> None:
    given = make()
    for seed in range(4):
        given["weight"] = make(seed=seed)["weight"] * (seed + 1)
        check_near(*both(given), 5e-3)


def test_orthonormal_rows_and_rows_that_others_span() -> None:
    rows = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    rows[3] = rows[0] - 2 * rows[1]
    basis = orthonormal(rows)
    kept = [0, 1, 2, 4]
    torch.testing.assert_close(basis[kept] @ basis[kept].t(), torch.eye(4))
    assert (basis[3] == 0).all()


@needs_screen
def test_the_bound_leaves_columns_open_only_with_check() -> None:
    given = make()
    screen_counts()
    linear_logprobs(**given, screen=True)
    assert screen_counts().open_columns == 0
    linear_logprobs(**given, screen=True, check=True)
    assert screen_counts().open_columns > 0
