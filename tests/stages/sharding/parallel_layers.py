"""Models that rank 0 loads and two ranks share, as a job of a rank: `main([result file])`."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from fastalign.causal_lm import fuse_head
from fastalign.stages.config import TrainConfig
from fastalign.stages.models.loading import load_on_main
from fastalign.stages.models.main_values import has_values, without_values
from fastalign.stages.models.sharding import clip_gradients, plan_sharding, shard, whole_tensor
from fastalign.stages.runs.distributed import World

# What each plan has that the others lack: norms of single heads; all projections in one layer, and an odd
# vocabulary; a scaled and tied embedding with a padding id; whole heads on each rank.
MODELS = {
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gpt_neox": {"vocab_size": 101},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 70, "tie_word_embeddings": True},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 3},
}
IDS = torch.randint(80, (4, 9), generator=torch.Generator().manual_seed(0))


def build(model_type: str) -> Any:
    """A fused model with two layers in fp64, without dropout. Norms are in fp32 in some of them."""
    sizes = {"hidden_size": 32, "intermediate_size": 47, "num_hidden_layers": 2, "num_attention_heads": 4}
    fixed = {"bos_token_id": 0, "eos_token_id": 1, "vocab_size": 96}
    config = AutoConfig.for_model(model_type, **{**sizes, **fixed, **MODELS[model_type]})
    torch.manual_seed(0)
    return fuse_head(AutoModelForCausalLM.from_config(config, dtype=torch.float64)).eval()


def gradients(model: Any) -> dict[str, Tensor]:
    """Of two micro-batches, accumulated."""
    for ids in IDS.split(2):
        model(input_ids=ids, labels=ids, num_items_in_batch=IDS.numel(), use_cache=False).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def compare(model_type: str) -> dict[str, float]:
    """The largest difference of a gradient, as a share of the largest gradient, and that of the norms."""
    model = build(model_type)
    parallel = copy.deepcopy(model) if dist.get_rank() == 0 else without_values(model)
    config = TrainConfig(train_data="x", output_dir="x", tp=2)
    shard(plan_sharding(config, 2, torch.device("cpu")), parallel)
    expected, found = gradients(model), gradients(parallel)
    assert expected.keys() == found.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    differences = (
        float((whole_tensor(found[name]) - gradient).abs().max()) for name, gradient in expected.items()
    )
    result = {"gradients": max(differences) / largest}
    norms = [clip_gradients([*each.parameters()], 1.0) for each in (model, parallel)]
    return result | {"norm": abs(norms[0] - norms[1]) / norms[0]}


def load_and_shard(model_type: str) -> dict[str, Any]:
    """What the ranks have of a model before and after it is sharded by FSDP2."""
    config = TrainConfig(train_data="x", output_dir="x", dp_shard=2)
    plan = plan_sharding(config, 2, torch.device("cpu"))
    world = World(dist.get_rank(), 2, torch.device("cpu"), sharding=plan)
    loads = []

    def load() -> Any:
        loads.append(model_type)
        return build(model_type)

    model = load_on_main(world, load)
    gathered: list[Any] = [None] * 2
    dist.all_gather_object(gathered, [len(loads), has_values(model)])
    shard(plan, model)
    expected = dict(build(model_type).named_parameters())
    found = {name: whole_tensor(weight) for name, weight in model.named_parameters()}
    equal = expected.keys() == found.keys() and all(
        torch.equal(found[name], expected[name]) for name in found
    )
    return {"before": gathered, "equal": equal}


def main(arguments: list[str]) -> None:
    """Write the differences to a JSON file on rank 0."""
    found: dict[str, Any] = {model_type: compare(model_type) for model_type in MODELS}
    found["loaded"] = load_and_shard("gemma2")
    if dist.get_rank() == 0:
        Path(arguments[0]).write_text(json.dumps(found))
