"""Screened logits to draw from: `sample` draws the tokens of exact logits from them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign_kernels import sample, screen_counts
from fastalign_kernels.gemm_int8 import code_rows, mm_int8
from fastalign_kernels.linear import screen_draws
from fastalign_kernels.linear.screen_draws import PAUSE, ScreenedDraws
from fastalign_kernels.softmax.rows import Transform, transform_ref
from tests.linear.screen_inputs import V, make, needs_screen

pytestmark = needs_screen

ROWS = 24
FILTERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "no filter": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 2.0},
    "top-k": {"top_k": 40},
    "one": {"top_k": 1},
    "min-p": {"min_p": 0.02, "temperature": 1.3},
    "top-p": {"top_p": 0.9},
    "top-p 0": {"top_p": 0.0},
    "top-k, top-p, min-p": {"top_k": 30, "top_p": 0.8, "min_p": 0.01},
    "top-p, min-p": {"top_p": 0.95, "min_p": 0.03},
    "penalty": {"repetition_penalty": 1.7, "top_k": 20},
}


def head(rows: int = ROWS, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Hidden states and weight [V, H], and V is no multiple of 256, 48 or 16."""
    given = make(dtype, tokens=rows)
    return given["hidden"], given["weight"]


def exact_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, scale: float = 1.0, cap: float | None = None
) -> Tensor:
    """Exact ones, rounded to fp32 once."""
    z = hidden.double() @ weight.double().t()
    return transform_ref(z, bias, Transform(scale, cap or 0.0, 1.0)).float()


def assert_same_draws(hidden: Tensor, weight: Tensor, options: dict[str, Any], *, seeds: int = 3) -> None:
    expected, draws = exact_logits(hidden, weight), ScreenedDraws(1.0, None)
    for seed in range(seeds):
        exact = sample(expected, seed=seed, **options)
        drawn = sample(draws.logits(hidden, weight, seed=seed, **options), seed=seed, **options)
        assert torch.equal(exact.token, drawn.token)
        assert torch.equal(exact.valid, drawn.valid)
        usable = exact.valid
        for name in ("logp", "log_kept", "logp_raw", "entropy"):
            error = (getattr(exact, name) - getattr(drawn, name))[usable].abs()
            assert error.numel() == 0 or error.max() < 0.02, name


@pytest.mark.parametrize("name", FILTERS)
def test_the_tokens_are_those_of_exact_logits(name: str) -> None:
    hidden, weight = head()
    options = dict(FILTERS[name])
    if name == "penalty":
        words = torch.randint(-(2**31), 2**31 - 1, (2, ROWS, -(-V // 32)), generator=_generator())
        options |= {"seen": words[0].int(), "allowed": words[1].int()}
    screen_counts()
    assert_same_draws(hidden, weight, options)
    counts = screen_counts()
    assert counts.tokens == 3 * ROWS and counts.exact_tokens == 0
    assert 0 < counts.exact_columns < counts.tokens * V // 4
    if "top-p" not in name or "top-k" in name or name == "top-p 0":
        assert counts.open_tokens == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_draws_from_the_fp32_products_of_its_factors(dtype: torch.dtype) -> None:
    hidden, weight = head(dtype=dtype)
    for options in ({}, {"top_k": 40}):
        assert_same_draws(hidden, weight, options)


def test_options_and_ends_of_single_rows() -> None:
    hidden, weight = head()
    finished = torch.arange(ROWS) % 5 == 0
    options = {
        "temperature": torch.tensor([0.0, 0.5, 1.0, 2.0] * 6),
        "top_k": torch.tensor([0, 0, 7, 50, 5000, 0] * 4),
        "top_p": torch.tensor([1.0, 0.9, 1.0] * 8),
        "finished": finished,
        "positions": torch.arange(ROWS) + 3,
        "sequence_ids": torch.arange(ROWS) * 7,
    }
    screen_counts()
    assert_same_draws(hidden, weight, options)
    assert screen_counts().tokens == 3 * (ROWS - int(finished.sum()))


def test_scale_softcap_and_bias() -> None:
    hidden, weight = head()
    bias = torch.randn(V, generator=_generator())
    expected = exact_logits(hidden, weight, bias, -0.7, 9.0)
    for options in ({}, {"top_k": 12}, {"temperature": 0.0}, {"min_p": 0.3}):
        logits = ScreenedDraws(-0.7, 9.0).logits(hidden, weight, bias, seed=5, **options)
        exact, drawn = sample(expected, seed=5, **options), sample(logits, seed=5, **options)
        assert torch.equal(exact.token, drawn.token)
        assert (exact.logp_raw - drawn.logp_raw).abs().max() < 0.02


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(9)


def enormous(hidden: Tensor, weight: Tensor) -> None:
    hidden[:, 7] = 1e4


def alike(hidden: Tensor, weight: Tensor) -> None:
    weight[:] = weight[:1]


def twins(hidden: Tensor, weight: Tensor) -> None:
    weight[1::2] = weight[::2]


def far(hidden: Tensor, weight: Tensor) -> None:
    hidden *= 1e4 / exact_logits(hidden, weight).abs().amax()


def zeros(hidden: Tensor, weight: Tensor) -> None:
    hidden[:] = 0


def flat(hidden: Tensor, weight: Tensor) -> None:
    hidden *= 1e-3


def broken(hidden: Tensor, weight: Tensor) -> None:
    hidden[2, 3] = math.nan
    hidden[4, 3] = math.inf


def broken_weight(hidden: Tensor, weight: Tensor) -> None:
    weight[11, 3] = math.nan


@pytest.mark.parametrize(
    "spoil", [enormous, alike, twins, far, zeros, flat, broken, broken_weight], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("name", ["greedy", "no filter", "top-k", "min-p", "top-p"])
def test_hostile_rows_draw_the_tokens_of_exact_logits(spoil: Any, name: str) -> None:
    hidden, weight = head(6)
    spoil(hidden, weight)
    if spoil is far:  # rounding of the products decides between ids whose logits are 1e4 and nearly equal
        hidden = hidden.round()
        weight = (weight * 64).round() / 64
    assert_same_draws(hidden, weight, FILTERS[name], seeds=2)


@pytest.mark.parametrize(
    "name", [name for name in FILTERS if name not in ("penalty", "top-p", "top-p, min-p")]
)
def test_the_bound_alone_tells_apart_what_8_bits_do_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty columns for each one, nearly the same, none of them exact for its probability."""
    monkeypatch.setattr(screen_draws, "EXACT_EPS", 0.9)
    hidden, weight = head()
    noise = torch.randn(V, weight.shape[1], generator=_generator())
    weight = weight[torch.arange(V) // 20 * 20] + 0.003 * noise
    hidden = 0.3 * hidden + 14 * weight[torch.randint(0, V, (ROWS,), generator=_generator())]
    screen_counts()
    assert_same_draws(hidden, weight, FILTERS[name], seeds=6)
    counts = screen_counts()
    assert counts.exact_tokens < counts.tokens // 2 and counts.exact_columns > 0


def test_rows_that_need_too_many_columns_are_computed_exactly() -> None:
    hidden, weight = head(6)
    screen_counts()
    assert_same_draws(hidden, weight, {"top_k": 3000}, seeds=1)
    counts = screen_counts()
    assert (counts.tokens, counts.exact_tokens) == (6, 6)


def test_after_a_step_that_had_to_be_exact_the_next_ones_are() -> None:
    hidden, weight = head(6)
    draws = ScreenedDraws(1.0, None)
    screen_counts()
    for top_k in [3000, *[5] * (PAUSE + 1)]:
        draws.logits(hidden, weight, seed=0, top_k=top_k)
    counts = screen_counts()
    assert counts.tokens - counts.exact_tokens == 6


def test_master_weights_are_rounded_to_the_dtype_of_the_hidden_states() -> None:
    hidden, weight = head(dtype=torch.bfloat16)
    master = weight.float() * (1 + 2**-10)
    draws = ScreenedDraws(1.0, None)
    logits = draws.logits(hidden, master, seed=0, temperature=0.0)
    expected = exact_logits(hidden, master.bfloat16())
    torch.testing.assert_close(logits.amax(1), expected.amax(1), atol=1e-4, rtol=0)


def test_no_token_at_all() -> None:
    hidden, weight = head()
    assert ScreenedDraws(1.0, None).logits(hidden[:0], weight, seed=0).shape == (0, V)


def as_they_are(hidden: Tensor, weight: Tensor) -> None: ...


@pytest.mark.parametrize("spoil", [as_they_are, enormous, twins, far, flat], ids=lambda f: f.__name__)
def test_the_bound_holds(spoil: Any) -> None:
    hidden, weight = head()
    spoil(hidden, weight)
    draws = ScreenedDraws(1.0, None)
    draws.logits(hidden, weight, seed=0)
    prepared = draws.prepared
    assert prepared is not None
    rows = code_rows(hidden, prepared.coded.rows.coding, left=True)
    z8 = torch.empty(ROWS, V)
    mm_int8(rows, prepared.coded.rows, z8)
    residual, length, slack = draws._row_bounds(rows, prepared)[:, :, None]
    column_length, column_residual = prepared.column_bounds
    bound = residual * column_length + length * column_residual + slack
    error = (z8.double() - hidden.double() @ weight.double().t()).abs()
    assert (error <= bound).all()
    assert error.max() > 0.01 * bound.max()  # and says something


def test_a_count_of_open_tokens_says_where_top_p_may_differ() -> None:
    hidden, weight = head(64)
    screen_counts()
    draws = ScreenedDraws(1.0, None)
    for seed in range(4):
        draws.logits(hidden, weight, seed=seed, top_p=0.97)
    counts = screen_counts()
    assert 0 < counts.open_tokens < counts.tokens // 2


def test_another_weight_is_coded_anew() -> None:
    hidden, weight = head()
    draws = ScreenedDraws(1.0, None)
    draws.logits(hidden, weight, seed=0)
    changed = weight.flip(0).contiguous()
    logits = draws.logits(hidden, changed, seed=0, temperature=0.0)
    assert torch.equal(logits.argmax(1), exact_logits(hidden, changed).argmax(1))
