"""Micro-batches, packing, shared prompts and ranks change nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Model,
)

from fastalign.stages import packers
from fastalign.stages.config import TrainConfig, save_config
from tests.stages.preference.runs import STAGES, Make, run
from tests.stages.ranks import run_two_ranks
from tests.stages.tiny import (
    assert_close,
)


def close(one: TrainConfig, other: TrainConfig) -> None:
    assert_close(one, other, atol=1e-10, rel=1e-9)


# Accumulation, ranks, packing, resume


@pytest.mark.parametrize("stage", STAGES)
def test_eight_micro_batches_of_one_equal_one_of_eight_packed_or_not(
    make: Make, files: dict[str, str], stage: str
) -> None:
    options = {"max_steps": 3, "eval_data": files[STAGES[stage][2]], "learning_rate": 1e-2}
    whole, parts, padded = (
        make(stage, **options, **more) for more in ({}, {"micro_batch_size": 1}, {"packing": False})
    )
    for config in (whole, parts, padded):
        run(config)
    close(whole, parts)
    close(whole, padded)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("reward", {}),
        ("dpo", {"lora_rank": 4}),
        ("kto", {}),
        ("dpo", {"reference": "precomputed", "gradient_checkpointing": True}),
    ],
)
def test_prompts_that_pairs_share_are_computed_once(
    make: Make,
    files: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage: str,
    options: dict[str, Any],
    attention: str,
) -> None:
    options = options | {
        "max_steps": 3,
        "eval_data": files[f"held_out_{STAGES[stage][2]}"],
        "learning_rate": 1e-2,
        "attention": attention,
    }
    tokens: list[int] = []
    forward = GPT2Model.forward

    def counted(self: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        tokens.append(input_ids.numel())
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(GPT2Model, "forward", counted)
    once, apart = make(stage, **options), make(stage, **options)
    run(once)
    assert "copy of the prompt" not in capsys.readouterr().out
    tokens_once, tokens[:] = sum(tokens), []
    monkeypatch.setattr(packers, "explain_unshared", lambda *_, **__: "a test's wish")
    run(apart)
    assert (
        capsys.readouterr().out.count(
            "packing: each sequence has its own copy of the prompt (a test's wish)\n"
        )
        == 1
    )
    # Of KTO's passes the reference's alone has pairs.
    assert tokens_once < (0.96 if stage == "kto" else 0.9) * sum(tokens)
    close(once, apart)


@pytest.mark.parametrize(
    ("stage", "options"),
    [("reward", {"lora_rank": 4}), ("dpo", {"lora_rank": 4}), ("kto", {"reference": "precomputed"})],
)
def test_two_gloo_ranks_equal_one_process(
    make: Make, files: dict[str, str], tmp_path: Path, stage: str, options: dict[str, Any]
) -> None:
    # Seven held-out rows: the ranks get unequal numbers of them.
    options = options | {
        "max_steps": 2,
        "micro_batch_size": 2,
        "eval_data": files[f"held_out_{STAGES[stage][2]}"],
        "learning_rate": 1e-2,
    }
    alone, together = make(stage, **options), make(stage, **options)
    run(alone)
    save_config(together, tmp_path / "two.yaml")
    run_two_ranks(tmp_path, f"fastalign.stages.{stage}", "--config", str(tmp_path / "two.yaml"))
    close(alone, together)
