"""The experiments of docs/screen.md, on small heads and models."""

from __future__ import annotations

import time

import pytest
import torch

from bench.experiments import screen_errors, screened_ppo, screened_tiles
from bench.experiments.screened_decode import FILTERS, made, measured
from tests.linear.screen_inputs import needs_screen
from tests.rollout.tiny_rollouts import llama


@needs_screen
@pytest.mark.parametrize("name", ["none", "top-p 0.9"])
def test_a_row_tells_times_counts_and_tokens_that_differ(name: str) -> None:
    hidden, weight = made(4, torch.float32, V=3000, H=64)
    cells = measured(hidden, weight, FILTERS[name], rounds=3, clock=time.process_time).split(" | ")
    assert len(cells) == 9
    assert all(float(cell) > 0 for cell in cells[:5])
    assert cells[-1] == "0 of 12"


@needs_screen
def test_a_row_tells_the_errors_of_a_step() -> None:
    model = llama()
    states, ids = torch.randn(2, 6, model.config.hidden_size), torch.arange(12).view(2, 6)
    step, logp, *rest = screen_errors.row(model, states, ids, 3).split(" | ")
    assert step == "3" and 0 <= float(logp) < 1e-3 and len(rest) == 7


def test_a_completion_scores_its_share_of_vowels() -> None:
    assert screened_ppo.vowels(["x"] * 3, ["aBE", "zzz", ""]) == [2 / 3, 0, 0]


def test_the_summary_has_the_first_and_the_last_scores() -> None:
    lines = [
        {"objective/scores": float(n), "objective/entropy": 2.0, "screen/exact_tokens": 0.5} for n in range(8)
    ]
    found = screened_ppo.summary([{"eval/nll": 1.0}, *lines])
    assert found == {"first": 0.0, "last": 6.5, "entropy": 2.0, "screen/exact_tokens": 0.5}


@needs_screen  # the sampled directions of the weight come from the native GEMM
def test_emulated_tiles_are_exact_where_all_columns_are_kept_and_nearer_with_more() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, ids = torch.randn(500, 64, generator=generator), torch.randint(0, 500, (40,), generator=generator)
    hidden = (weight[ids] + torch.randn(40, 64, generator=generator)) / 8
    logits = screened_tiles.logits_of(hidden, weight)
    many, few = (screened_tiles.errors(logits, ids, eps, 16) for eps in (2.0**-9, 2.0**-4))
    assert few.kept < many.kept <= 1 and 0 < many.logp < few.logp < 0.1
    assert screened_tiles.errors(logits, ids, 0.0, 16) == (1, 0, 0, 0)
    kept = screened_tiles.kept_columns(logits.screened, ids, 2.0**-9, 16)
    exceeds = logits.screened.softmax(1) > 2.0**-9
    assert all(not (exceeds[i] & ~kept[i // 16]).any() and kept[i // 16, ids[i]] for i in range(40))
