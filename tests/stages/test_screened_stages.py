"""`screen=true` in the stages: what is logged, and what is refused before any work."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from fastalign.stages import pretrain, sft
from fastalign.stages.head_counts import head_counts, reset_counts
from fastalign.stages.models.loading import check_screen
from fastalign.stages.policy_configs import GRPOConfig
from fastalign.stages.runs.distributed import World
from fastalign_kernels import native
from fastalign_kernels.linear.gpu import device as gpu_device
from fastalign_kernels.linear.screen import COUNTER, ScreenCounts
from tests.stages.tiny import lines


@pytest.mark.skipif(
    not native.has_int8_gemm(),
    reason="csrc/int8 needs AVX-512 VNNI, and this CPU has none (or the library is not there)",
)
def test_a_screened_run_logs_how_many_tokens_were_exact(
    pretraining: Callable[..., pretrain.PretrainConfig],
) -> None:
    exact, screened = (
        pretraining(max_steps=2, tail_eps=1e-4, eval_every=1, **options) for options in ({}, {"screen": True})
    )
    pretrain.run(exact)
    pretrain.run(screened)
    before, *steps = lines(screened)
    assert "screen/exact_tokens" not in before  # the counts are those of a step
    assert all(0 <= line["screen/exact_tokens"] <= 1 for line in steps)
    for line, plain in zip(lines(screened), lines(exact), strict=True):
        assert line["eval/nll"] == pytest.approx(plain["eval/nll"], abs=1e-3)
        assert "screen/exact_tokens" not in plain


def test_the_counts_of_a_step_are_shares() -> None:
    reset_counts()
    assert head_counts() == {}
    COUNTER.add(ScreenCounts(tokens=8, exact_tokens=2, exact_columns=30))
    assert head_counts() == {"screen/exact_tokens": 0.25, "screen/exact_columns": 5.0}
    COUNTER.add(ScreenCounts(tokens=8, exact_tokens=8))
    assert head_counts() == {"screen/exact_tokens": 1.0}


def test_a_machine_without_8_bit_products_is_refused_before_any_row_is_read(
    tuning: Callable[..., sft.SFTConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="screen: got true, expected false: factors of torch.float64 have"):
        sft.run(tuning(screen=True, train_data="no such file"))
    monkeypatch.setattr(native, "has_int8_gemm", lambda: False)
    monkeypatch.setattr(native, "missing", "")
    with pytest.raises(ValueError, match="screen: got true, expected false: this CPU has no AVX-512 VNNI"):
        sft.run(tuning(screen=True, train_data="no such file", dtype="float32"))


def test_on_a_gpu_a_screen_needs_a_tail_and_rollouts_stay_exact(
    tuning: Callable[..., sft.SFTConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World(0, 1, torch.device("cuda"))
    monkeypatch.setattr(gpu_device, "architecture", lambda index: 90)
    with pytest.raises(ValueError, match="screen: got true, expected false: a GPU has 8-bit products of"):
        check_screen(tuning(screen=True, dtype="float32"), world)
    tuning = partial(tuning, screen=True, dtype="bfloat16")
    with pytest.raises(ValueError, match="screen: got true without tail_eps, expected false: on a GPU"):
        check_screen(tuning(), world)
    check_screen(tuning(tail_eps=1e-4), world)
    assert "rollouts" not in capsys.readouterr().out
    fields: dict[str, Any] = dict.fromkeys(("model", "train_data", "output_dir"), "none")
    check_screen(
        GRPOConfig(**fields, reward="none:count", screen=True, tail_eps=1e-4, dtype="bfloat16"), world
    )
    assert "screen: the rollouts draw from exact logits" in capsys.readouterr().out
