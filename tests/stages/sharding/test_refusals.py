"""What a run refuses before it loads a model that is to be shared."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastalign.stages import sft
from fastalign.stages.config import TrainConfig
from fastalign.stages.models.sharding import plan_sharding
from fastalign.stages.policy_configs import PPOConfig

Make = Callable[..., sft.SFTConfig]
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("mesh", "ranks", "message"),
    [
        (
            {"dp_shard": 3},
            4,
            "= 1 x 3 = 3 ranks, expected the 4 .*: dp_shard may be 1, 2, 4, with",
        ),
        ({"dp_shard": 2, "dp_replicate": 4}, 4, "= 4 x 2 = 8 ranks, expected the 4"),
        ({"dp_shard": 2}, 1, "= 1 x 2 = 2 ranks, expected the 1 of this run"),
        ({"dp_replicate": 2}, 4, "= 2 x 1 = 2 ranks, expected the 4"),
    ],
)
def test_a_mesh_that_does_not_fit_the_ranks(mesh: dict[str, Any], ranks: int, message: str) -> None:
    config = TrainConfig(train_data="x", output_dir="x", **mesh)
    with pytest.raises(ValueError, match="dp_shard: got dp_replicate x dp_shard " + message):
        plan_sharding(config, ranks, CPU)


def test_a_mesh_of_whole_models_that_fits_is_no_sharding() -> None:
    assert plan_sharding(TrainConfig(train_data="x", output_dir="x", dp_replicate=4), 4, CPU) is None


@pytest.mark.parametrize(
    ("variable", "engine"),
    [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", r"DeepSpeed \(ZeRO\)")],
)
def test_engines_of_accelerate_launch(
    tuning: Make, no_model: None, monkeypatch: pytest.MonkeyPatch, variable: str, engine: str
) -> None:
    monkeypatch.setenv(variable, "true")
    expected = (
        f"^{variable}: got true, expected a launch without accelerate's {engine}: the stages shard with"
    )
    with pytest.raises(ValueError, match=expected):
        sft.run(tuning())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cpu_offload": True}, "cpu_offload: got true with dp_shard=1, expected dp_shard of at least 2"),
        ({"compile": True, "dp_shard": 2}, "compile: got true with dp_shard=2, expected false"),
    ],
)
def test_options_that_exclude_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(train_data="x", output_dir="x", **options)


def test_a_compiled_rollout_of_a_sharded_policy() -> None:
    with pytest.raises(ValueError, match="compile_rollout: got true with dp_shard=2, expected false"):
        PPOConfig(train_data="x", output_dir="x", model="x", reward="m:f", compile_rollout=True, dp_shard=2)
