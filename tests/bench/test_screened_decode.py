"""The experiment that times a screened draw."""

from __future__ import annotations

import time

import pytest
import torch

from bench.experiments.screened_decode import FILTERS, made, measured
from tests.linear.screen_inputs import needs_screen


@needs_screen
@pytest.mark.parametrize("name", ["none", "top-p 0.9"])
def test_a_row_tells_times_counts_and_tokens_that_differ(name: str) -> None:
    hidden, weight = made(4, torch.float32, V=3000, H=64)
    cells = measured(hidden, weight, FILTERS[name], rounds=3, clock=time.process_time).split(" | ")
    assert len(cells) == 9
    assert all(float(cell) > 0 for cell in cells[:5])
    assert cells[-1] == "0 of 12"
