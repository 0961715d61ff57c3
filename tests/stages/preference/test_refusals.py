"""What the reward model, DPO and KTO refuse, and what their commands say."""

from typing import Any, get_args

import pytest
import torch

from fastalign import cli
from fastalign.stages import dpo, kto
from fastalign.stages.config import describe
from fastalign.stages.models import loading
from fastalign.stages.pair_loss import REFERENCE_FREE
from fastalign.stages.runs.distributed import World
from fastalign_kernels.preference.arguments import KTO_LOSS_TYPES
from fastalign_kernels.preference.formulas import DPO_LOSS_TYPES
from tests.stages.preference.runs import STAGES, Make, run
from tests.stages.tiny import undescribed

# Refusals


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("dpo", {"loss_type": "sigmod"}, "loss_type"),
        (
            "dpo",
            {"label_smoothing": 0.1, "loss_type": "hinge"},
            "label_smoothing: got 0.1, expected 0 with loss_type='hinge'",
        ),
        ("dpo", {"loss_type": "exo_pair"}, "label_smoothing: got 0.0, expected"),
        ("dpo", {"beta": 0}, "beta"),
        (
            "dpo",
            {"reference": "adapters_off"},
            r"reference: got adapters_off without adapters \(lora_rank=0\)",
        ),
        (
            "dpo",
            {"loss_type": "orpo", "reference": "copy"},
            "reference: got copy with loss_type=orpo, which has no reference, expected auto",
        ),
        (
            "dpo",
            {"loss_type": "cpo", "reference": "precomputed", "reference_dir": "x"},
            "reference: got precomputed with loss_type=cpo",
        ),
        (
            "dpo",
            {"loss_type": "orpo", "label_smoothing": 0.1},
            "label_smoothing: got 0.1 with loss_type=orpo",
        ),
        ("dpo", {"loss_type": "cpo", "gamma": 1.0}, "gamma: got 1.0 with loss_type=cpo, expected none"),
        ("dpo", {"alpha": 0.5}, "alpha: got 0.5 with loss_type=sigmoid, expected none"),
        ("dpo", {"loss_type": "simpo", "alpha": -1.0}, "alpha"),
        (
            "dpo",
            {"loss_type": "simpo", "nll_mean": True},
            "nll_mean: got True with loss_type=simpo, expected",
        ),
        ("kto", {"reference_dir": "x"}, r"reference_dir: got 'x' with reference=auto, expected precomputed"),
        ("kto", {"batch_size": 1}, "batch_size: got 1, expected at least 2: .* another row of its step"),
        ("kto", {"desirable_weight": -1}, "desirable_weight"),
        ("reward", {"center_coefficient": -1}, "center_coefficient"),
        ("reward", {"beta": 0.1}, "unknown key 'beta'"),
        ("reward", {"tail_eps": 0.01}, r"tail_eps: got 0.01, expected null"),
        ("reward", {"screen": True}, r"screen: got true, expected false"),
        ("dpo", {"tail_eps": 1.0}, "tail_eps"),
        (
            "kto",
            {"screen": True, "lora_rank": 2, "lora_targets": ["lm_head"]},
            "screen: got true with lora_targets=lm_head, expected false",
        ),
    ],
)
def test_a_wrong_configuration_is_refused_by_name(
    make: Make, stage: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(stage, **changes)


def test_rows_that_cannot_be_used_are_refused_before_the_model_loads(
    make: Make, files: dict[str, str], no_model: None
) -> None:
    for stage in ("reward", "dpo"):
        with pytest.raises(
            ValueError, match=r"bad\.jsonl, row 2: columns 'chosen' and 'rejected': got the same answer"
        ):
            run(make(stage, train_data=files["bad"]))
        with pytest.raises(
            ValueError, match=r"judged\.jsonl: columns: got .*, label, expected 'chosen' and 'rejected' too"
        ):
            run(make(stage, train_data=files["judged"]))
    with pytest.raises(
        ValueError, match=r"bad_labels\.jsonl, row 2: column 'label': got 'yes', expected true or false"
    ):
        run(make("kto", train_data=files["bad_labels"]))
    with pytest.raises(
        ValueError,
        match=r"batch_size: got 8, with which all rows of step 1 have .* 1 of the 4 rows' completions",
    ):
        run(make("kto", train_data=files["alike"]))
    with pytest.raises(
        ValueError, match="eval_data: rows: got 4 with the same completion, expected at least two different"
    ):
        run(make("kto", eval_data=files["alike"]))


def test_the_loss_types_are_the_kernels() -> None:
    assert get_args(dpo.DPOConfig.__annotations__["loss_type"]) == (*DPO_LOSS_TYPES, *REFERENCE_FREE)
    assert get_args(kto.KTOConfig.__annotations__["loss_type"]) == KTO_LOSS_TYPES


def test_a_model_that_packs_wrongly_is_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    check = loading.check_packing

    def noted(model: Any, **options: Any) -> None:
        asked.append(type(model).__name__)
        check(model, **options)

    monkeypatch.setattr(loading, "check_packing", noted)
    for stage in STAGES:
        run(make(stage))
        run(make(stage, packing=False))
    assert asked == ["GPT2Model", "GPT2LMHeadModel", "GPT2LMHeadModel"]


@pytest.mark.parametrize("stage", STAGES)
def test_every_field_is_described_and_the_command_shows_it(
    stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = STAGES[stage][1]
    assert not undescribed(config)
    with pytest.raises(SystemExit):
        cli.main([stage, "--help"])
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: fastalign {stage}") and describe(config) in shown
    assert stage == "reward" or "learning_rate: float (> 0) = 1.0e-06" in shown


def test_world_places_batches_within_batches() -> None:
    world = World(0, 1, torch.device("meta"))
    placed = world.place({"a": {"b": torch.ones(2), "c": (1,)}, "d": 3})
    assert placed["a"]["b"].is_meta and placed["a"]["c"] == (1,) and placed["d"] == 3
