"""Counts the collectives of micro-batches of a sharded Llama, and compares its screened log-probabilities
with exact ones, as a job of a rank: `main([result file])`."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from fastalign.causal_lm import fuse_head
from fastalign.stages.config import TrainConfig
from fastalign.stages.models.sharding import accumulating, plan_sharding, shard, whole
from fastalign_kernels import native
from fastalign_kernels.linear import screen

LAYERS, HIDDEN, VOCAB, TOKENS = 2, 32, 1024, 64
GATHER, REDUCE = "_allgather_base_", "_reduce_scatter_base_"


class Collectives(TorchDispatchMode):
    """Records name, dtype and elements of a rank's input of each collective."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, str, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d" and function._opname in (GATHER, REDUCE):
            self.calls.append((function._opname, str(args[1].dtype), args[1].numel()))
        return function(*args, **(kwargs or {}))


def llama(*, tied: bool) -> Any:
    """A Llama in fp32 with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=tied,
        )
    )


def count(*, bf16: bool, tied: bool, workspace_mib: float) -> dict[str, Any]:
    """The collectives of a first and of the last micro-batch of a step, and of a model made whole twice."""
    config = TrainConfig(train_data="x", output_dir="x", dp_shard=dist.get_world_size(), bf16=bf16)
    torch.manual_seed(0)
    model = fuse_head(llama(tied=tied))
    shard(plan_sharding(config, dist.get_world_size(), torch.device("cpu")), model)
    ids = torch.arange(TOKENS).view(2, -1)
    result: dict[str, Any] = {}
    for name, last in (("first", False), ("last", True)):
        with Collectives() as seen, accumulating(model, last=last):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(input_ids=ids, labels=ids, workspace_mib=workspace_mib, use_cache=False).loss
            loss.backward()
        result[name] = seen.calls
    with Collectives() as seen, torch.no_grad(), whole(model), whole(model):
        for _ in range(3):
            model(input_ids=ids, use_cache=False)
    result["whole"] = seen.calls
    gradients = (weight.grad for weight in model.parameters() if weight.grad is not None)
    result["dtypes"] = sorted({str(gradient.dtype) for gradient in gradients})
    return result


def screened_steps(steps: int) -> list[tuple[float, float]]:
    """Of passes between which a few numbers of the head change: the largest error of a screened logp in nats,
    and the largest change since the pass before."""
    config = TrainConfig(train_data="x", output_dir="x", dp_shard=dist.get_world_size())
    torch.manual_seed(0)
    model = llama(tied=False)
    with torch.no_grad():
        model.lm_head.weight *= 30
    fuse_head(model)
    shard(plan_sharding(config, dist.get_world_size(), torch.device("cpu")), model)
    screen.LARGEST_SHARE = 1.0  # of so few columns many matter
    ids = torch.arange(TOKENS).view(2, -1)
    call: dict[str, Any] = {"input_ids": ids, "labels": ids, "token_stats": True, "use_cache": False}
    result, before = [], None
    for _ in range(steps):
        with torch.no_grad(), whole(model):
            exact = model(**call).logp
            fuse_head(model, screen=True)
            screened = model(**call).logp
            fuse_head(model)
        change = 0.0 if before is None else float((exact - before).abs().max())
        result.append((float((exact - screened).abs().max()), change))
        before = exact
        model.lm_head.weight.to_local().data[:8, 17] += 1.0
    return result


def main(arguments: list[str]) -> None:
    """Write what was counted to a JSON file on rank 0."""
    counted: dict[str, Any] = {
        "untied": count(bf16=False, tied=False, workspace_mib=100),
        "many chunks": count(bf16=False, tied=False, workspace_mib=0.01),
        "tied": count(bf16=False, tied=True, workspace_mib=0.01),
        "bf16": count(bf16=True, tied=False, workspace_mib=0.01),
    }
    if native.has_int8_gemm():
        counted["screened"] = screened_steps(3)
    if dist.get_rank() == 0:
        Path(arguments[0]).write_text(json.dumps(counted))
