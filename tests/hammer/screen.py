"""Cases of screened logits: tokens drawn from them, and log-probabilities within their bound."""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastalign_kernels import linear_token_stats, native, sample
from fastalign_kernels.gemm_int8 import code_rows
from fastalign_kernels.linear import screen_draws
from fastalign_kernels.linear.screen_draws import ScreenedDraws, _Prepared
from fastalign_kernels.sampling_inputs import sample_inputs
from fastalign_kernels.softmax.rows import Transform, transform_ref
from tests.hammer.case import log_uniform, maybe, size
from tests.hammer.sampling import generator_of, options_of

MOST = 10**9  # columns of a row that may be exact: all


def head_of(r: random.Random) -> tuple[Tensor, Tensor]:
    """Hidden states [B, H] and weight [V, H], ordinary and hostile ones."""
    B, H, V = size(r, 12), size(r, 160), r.choice((size(r, 5000), r.randint(500, 5000)))
    generator = generator_of(r)
    weight = torch.randn(V, H, generator=generator) / H**0.5
    hidden = torch.randn(B, H, generator=generator) * r.choice((0.0, 1e-3, 1, 1, 3, 30))
    if r.random() < 0.5 and V > 1:  # equal rows, or nearly equal ones, which 8 bits do not tell apart
        near = r.choice((0.0, 0.001, 0.01)) * torch.randn(V, H, generator=generator) / H**0.5
        weight = weight[torch.randint(0, max(1, V // 20), (V,), generator=generator)] + near
    if r.random() < 0.6:  # likely ids
        hidden += log_uniform(r, 1, 30) * weight[torch.randint(0, V, (B,), generator=generator)]
    if r.random() < 0.2:
        hidden[:, r.randrange(H)] *= 10 ** r.uniform(1, 4)
    if r.random() < 0.15:
        weight[:, r.randrange(H)] *= 10 ** r.uniform(1, 3)
    if r.random() < 0.1:
        weight[r.randrange(V)] *= 1e3
    if r.random() < 0.1:
        hidden[r.randrange(B), r.randrange(H)] = r.choice((math.nan, math.inf))
    if r.random() < 0.05:
        weight[r.randrange(V), r.randrange(H)] = math.nan
    dtype = r.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16))
    return hidden.to(dtype), weight.to(dtype)


def transform_of(r: random.Random) -> Transform:
    return Transform(
        maybe(r, r.choice((-1, 1)) * log_uniform(r, 0.05, 3), 1.0, 0.3),
        maybe(r, log_uniform(r, 5, 50), 0.0, 0.2),
        1.0,
    )


def bounds(draws: ScreenedDraws, hidden: Tensor, prepared: _Prepared) -> Tensor:
    """How far each 8-bit logit [B, V] may be off."""
    rows = code_rows(hidden, prepared.coded.rows.coding, left=True)
    residual, length, slack = draws._row_bounds(rows, prepared)[:, :, None]
    column_length, column_residual = prepared.column_bounds
    return residual * column_length + length * column_residual + slack


def screened(
    draws: ScreenedDraws, hidden: Tensor, prepared: _Prepared, options: dict[str, Any]
) -> tuple[Tensor, Tensor, int]:
    """The tile, the rows that could not be screened, and how many tokens are open."""
    draws.tile = torch.empty(hidden.shape[0], prepared.weight.shape[0])
    counts, unresolved = draws._screen(hidden, prepared, sample_inputs(draws.tile, **options))
    return draws.tile, unresolved, counts.open_tokens


@contextmanager
def limits(eps: float, most: int) -> Iterator[None]:
    """Other limits of what is exact."""
    before = screen_draws.EXACT_EPS, screen_draws.MOST_OF_FEW
    screen_draws.EXACT_EPS, screen_draws.MOST_OF_FEW = eps, most
    try:
        yield
    finally:
        screen_draws.EXACT_EPS, screen_draws.MOST_OF_FEW = before


def draws_case(r: random.Random) -> None:
    """A draw is the one from exact products of the same arithmetic, but for open tokens."""
    hidden, weight = head_of(r)
    transform = transform_of(r)
    bias = maybe(r, torch.randn(weight.shape[0], generator=generator_of(r)), None, 0.3)
    options = options_of(r, hidden.shape[0], weight.shape[0])
    draws = ScreenedDraws(transform.logit_scale, transform.softcap)
    prepared = _Prepared.of(weight, bias, hidden.dtype)
    # Of few columns most are exact for their probability. With a large eps the bound alone decides.
    eps = r.choice((screen_draws.EXACT_EPS, 0.9, 0.9))
    with limits(eps, screen_draws.MOST_OF_FEW):
        mixed, unresolved, open_tokens = screened(draws, hidden, prepared, options)
    resolved = torch.ones(hidden.shape[0], dtype=torch.bool)
    resolved[unresolved] = False
    resolved &= ~options.get("finished", ~resolved)
    with limits(1e-35, MOST):
        exact, *_ = screened(draws, hidden, prepared, options)
    truth = transform_ref(
        hidden.double() @ weight.double().t(), None if bias is None else bias.double(), transform
    )
    off, bound = (mixed - truth).abs(), bounds(draws, hidden, prepared)
    assert (off <= bound)[resolved].all(), "a logit is off by more than its bound"
    ours, true = sample(mixed, **options), sample(exact, **options)
    differ = (ours.token != true.token) & resolved
    assert int(differ.sum()) <= open_tokens, f"rows {differ.nonzero()[:, 0].tolist()}: {ours} and {true}"
    assert torch.equal(ours.valid[resolved], true.valid[resolved])


def statistics_case(r: random.Random) -> None:
    """logp is off by at most the largest bound of its token, with the same bits on two threads."""
    hidden, weight = head_of(r)
    ids = torch.randint(0, weight.shape[0], (hidden.shape[0],), generator=generator_of(r))
    options: dict[str, Any] = {
        "softcap": maybe(r, log_uniform(r, 5, 50), None, 0.2),
        "logit_scale": maybe(r, log_uniform(r, 0.05, 3), 1.0, 0.3),
    }
    exact = linear_token_stats(hidden, weight, ids, **options)
    ours = linear_token_stats(hidden, weight, ids, screen=True, **options)
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(2, threads))
    again = linear_token_stats(hidden, weight, ids, screen=True, **options)
    torch.set_num_threads(threads)
    assert torch.equal(ours.logp.nan_to_num(7.0), again.logp.nan_to_num(7.0))
    assert torch.equal(ours.logp.isnan(), exact.logp.isnan())
    draws = ScreenedDraws(options["logit_scale"], options["softcap"])
    bound = bounds(draws, hidden, _Prepared.of(weight, None, hidden.dtype)).amax(1)
    finite = exact.logp.isfinite() & bound.isfinite()
    off = (ours.logp - exact.logp).abs()
    assert (off <= bound + 1e-5 * exact.logp.abs() + 1e-5)[finite].all(), (off, bound)


CASES = {"draws": draws_case, "draws again": draws_case, "statistics": statistics_case}


def fuzz(r: random.Random) -> str:
    if not native.has_int8_gemm():
        return "no 8-bit products on this CPU"
    kind = r.choice(list(CASES))
    CASES[kind](r)
    return kind
