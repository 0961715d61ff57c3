"""Tensor parallelism: the gradients of models with other plans than those of test_stages.py, and refusals.

And a model that rank 0 alone loads.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PretrainedConfig

from fastalign.stages.config import TrainConfig
from fastalign.stages.models.sharding import plan_sharding
from fastalign.stages.models.tensor_parallel import check_plan
from fastalign.stages.policy_configs import GRPOConfig, PPOConfig
from tests.stages.ranks import Ranks
from tests.stages.sharding.parallel_layers import MODELS


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("parallel_layers")
    Ranks(folder, 2, [("tests.stages.sharding.parallel_layers", [str(folder / "found.json")])]).join()
    found: dict[str, Any] = json.loads(Path(folder, "found.json").read_text())
    return found


@pytest.mark.cpu_only
@pytest.mark.parametrize("model_type", MODELS)
def test_accumulated_gradients_and_their_norm_are_those_of_a_whole_model(
    on_ranks: dict[str, Any], model_type: str
) -> None:
    """Norms in fp32 round a sum that the ranks make in another order to another number."""
    found = on_ranks[model_type]
    exact = model_type == "gpt_neox"
    assert found["gradients"] < (1e-13 if exact else 1e-6)
    assert found["norm"] < (1e-13 if exact else 1e-6)


@pytest.mark.cpu_only
def test_rank_0_alone_loads_a_model_and_the_other_rank_gets_its_shard(on_ranks: dict[str, Any]) -> None:
    assert on_ranks["loaded"] == {"before": [[1, True], [0, False]], "equal": True}


def architecture(model_type: str, **fields: Any) -> PretrainedConfig:
    config: PretrainedConfig = AutoConfig.for_model(model_type, **fields)
    return config


@pytest.mark.parametrize(
    ("model", "size", "message"),
    [
        (architecture("gpt2"), 2, "tp: got 2, expected 1: .* no tensor-parallel plan .* for gpt2"),
        (architecture("mixtral"), 2, "tp: got 2, expected 1: the plan of mixtral has moe_tp_experts, "),
        (
            architecture("llama", hidden_size=48, num_attention_heads=6, num_key_value_heads=2),
            4,
            "tp: got 4, expected a divisor of the model's num_attention_heads=6 and num_key_value_heads=2",
        ),
        (
            architecture("llama", num_attention_heads=8, num_key_value_heads=2),
            4,
            "tp: got 4, expected a divisor of the model's num_key_value_heads=2$",
        ),
    ],
)
def test_a_model_that_cannot_be_split(model: PretrainedConfig, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_plan(model, size)


@pytest.mark.parametrize(
    ("mesh", "ranks", "message"),
    [
        ({"tp": 3}, 4, "tp: got dp_replicate x dp_shard x tp = 1 x 1 x 3 = 3 ranks, .*: tp may be 1, 2, 4$"),
        (
            {"tp": 2, "dp_shard": 3},
            8,
            r"dp_shard: got dp_replicate x dp_shard x tp = 1 x 3 x 2 = 6 ranks, expected the 8 .*: "
            r"dp_shard may be 1, 2, 4, with dp_replicate=4 / dp_shard",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_the_ranks(mesh: dict[str, Any], ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_sharding(TrainConfig(train_data="x", output_dir="x", **mesh), ranks, torch.device("cpu"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cpu_offload": True, "dp_shard": 2}, "cpu_offload: got true with tp=2, expected false"),
        ({"compile": True}, "compile: got true with tp=2, expected false"),
        ({"screen": True}, "screen: got true with tp=2, expected false"),
        (
            {"lora_rank": 4, "lora_targets": ["lm_head"]},
            "lora_targets: got lm_head with tp=2, expected other",
        ),
    ],
)
def test_options_that_do_not_go_with_tensor_parallelism(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(train_data="x", output_dir="x", tp=2, **options)


@pytest.mark.parametrize("config", [PPOConfig, GRPOConfig])
def test_rollouts_of_a_split_policy(config: Any) -> None:
    with pytest.raises(ValueError, match="tp: got 2, expected 1: rollouts do not sample from a vocabulary"):
        config(train_data="x", output_dir="x", model="x", reward="m:f", tp=2)
