"""The estimate of a run whose ranks share a model."""

from typing import Any

import torch

from fastalign.stages import estimate
from fastalign.stages.config import TrainConfig
from fastalign.stages.estimate import Estimate, Part, Shape
from fastalign.stages.models.sharding import gathered_weights
from fastalign.stages.runs.distributed import World
from tests.stages.sharding.collectives import llama

SHAPE = Shape(rows=1, width=8, targets=7, masked=False)


def estimated(cached: tuple[int, int] | None = None, **options: Any) -> Estimate:
    config = TrainConfig(train_data="x", output_dir="x", **options)
    world = World(0, config.dp_shard, torch.device("cpu"))
    part = Part("model", llama(tied=False).config)
    return estimate.estimate(config, world, part, SHAPE, upstream="scalar", cached=cached)


def test_four_ranks_keep_a_quarter_of_weights_gradients_and_moments_each() -> None:
    alone, sharded = estimated(), estimated(dp_shard=4)
    for name in ("weights", "gradients", "moments"):
        assert getattr(sharded, name) == getattr(alone, name) / 4
    assert (alone.gathered, alone.parameters) == (0, sharded.parameters)
    assert alone.activations == sharded.activations


def test_a_pass_gathers_the_head_and_two_layers() -> None:
    model = llama(tied=False)
    layer = sum(weight.numel() for weight in model.model.layers[0].parameters())
    expected = model.lm_head.weight.numel() + model.model.norm.weight.numel() + 2 * layer
    assert gathered_weights(model) == expected
    assert estimated(dp_shard=4).gathered == 2 * 4 * expected, "weights and gradients, fp32"
    assert estimated(dp_shard=4, bf16=True).gathered == 2 * 2 * expected


def test_a_rollout_has_a_whole_model_beside_its_cache() -> None:
    alone, sharded = estimated(cached=(2, 16)), estimated(cached=(2, 16), dp_shard=4)
    assert sharded.cache == alone.cache + alone.weights


def test_ranks_that_share_layers_keep_their_parts_and_whole_norms() -> None:
    model = llama(tied=False)
    norms = sum(weight.numel() for name, weight in model.named_parameters() if "norm" in name)
    weights = sum(weight.numel() for weight in model.parameters())
    assert estimated(tp=2).weights == 4 * (norms + (weights - norms) / 2)
