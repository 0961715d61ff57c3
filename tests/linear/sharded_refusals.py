"""Calls that a sharded head refuses."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fastalign.integrations.liger import LigerFusedLinearJSD
from fastalign.integrations.torch import linear_cross_entropy as torch_linear_cross_entropy
from fastalign_kernels import (
    cross_entropy,
    linear_cross_entropy,
    linear_distillation_loss,
    linear_dpo_loss,
    linear_logprobs,
    linear_ppo_loss,
    sample,
    tail_report,
)
from tests.linear.sharded_cases import Data, V, tensors


def refusals(data: Data) -> dict[str, str]:
    """What each of two ranks is told, by what is wrong; data: of 40 and of 83 rows."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    plane = init_device_mesh("cpu", (1, ranks), mesh_dim_names=("dp", "tp"))
    other = dist.new_group(list(range(ranks)))
    destroyed = dist.new_group(list(range(ranks)))
    dist.destroy_process_group(destroyed)
    whole = Data.drawn(torch.float64)
    by_rows = distribute_tensor(whole.weight, mesh, [Shard(0)])
    by_columns = distribute_tensor(whole.weight, mesh, [Shard(1)])
    head = torch.nn.Linear(19, V, bias=False, dtype=torch.float64)
    fully_shard(head)
    replicas = torch.nn.Linear(19, V, bias=False, dtype=torch.float64)
    fully_shard(replicas, mesh=plane)  # one replica, which all ranks share
    lying = DTensor.from_local(data.weight, mesh, [Shard(0)], shape=torch.Size((V + 1, 19)), stride=(19, 1))
    group: Any = {"group": dist.group.WORLD}
    a, b = torch.ones(3, 19, dtype=torch.float64), torch.ones(data.weight.shape[0], 3, dtype=torch.float64)

    def ce(*, options: Any = group, **change: Any) -> Any:
        return lambda: linear_cross_entropy(*tensors(data._replace(**change)), **options)

    @torch.compile(backend="eager")
    def compiled_logprobs() -> Tensor:
        return linear_logprobs(data.hidden, 2 * head.weight, data.ids)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def one_graph(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        return linear_logprobs(hidden, weight, ids, **group)

    def dpo(reference_weight: Tensor) -> Any:
        rows = data.hidden.view(4, -1, 19)
        return lambda: linear_dpo_loss(
            rows,
            data.weight,
            data.ids.view(4, -1),
            reference_hidden=rows,
            reference_weight=reference_weight,
            **group,
        )

    calls = {
        "no group": ce(options={"group": "tp"}),
        "two dimensions": ce(options={"group": plane}),
        "destroyed": ce(options={"group": destroyed}),
        "another group": ce(options={"group": other}, weight=by_rows, bias=None),
        "columns": ce(options={}, weight=by_columns, bias=None),
        "replicated": ce(options={}, weight=distribute_tensor(whole.weight, mesh, [Replicate()]), bias=None),
        # of the same tokens, by chance
        "FSDP2": ce(options={}, weight=head.weight, bias=None),
        "FSDP2, detached": ce(options={}, weight=head.weight.detach(), bias=None),
        "FSDP2, compiled": torch.compile(ce(options={}, weight=head.weight, bias=None), backend="eager"),
        "FSDP2, computed from, compiled": compiled_logprobs,
        "HSDP": ce(options={}, weight=replicas.weight, bias=None),
        "rows of another V": ce(options={}, weight=lying, bias=None),
        "plain bias": ce(options={}, weight=by_rows),
        "DTensor hidden": ce(options={}, hidden=distribute_tensor(whole.hidden, mesh, [Replicate()])),
        "DTensor ids": ce(ids=distribute_tensor(whole.ids, mesh, [Shard(0)])),
        "DTensor bias": ce(
            options={}, weight=whole.weight, bias=distribute_tensor(whole.bias, mesh, [Shard(0)])
        ),
        "DTensor weights": ce(options=group | {"token_weights": distribute_tensor(whole.values[0], mesh)}),
        "DTensor num_items": ce(options=group | {"num_items": distribute_tensor(torch.ones(()), mesh)}),
        "DTensor adapter": ce(options=group | {"lora": (a, distribute_tensor(b, mesh, [Shard(0)]), 2.0)}),
        "DTensor mask": lambda: linear_ppo_loss(
            data.hidden,
            data.weight,
            data.ids,
            old_logp=data.values[1],
            advantages=data.values[2],
            mask=distribute_tensor(data.ids >= 0, mesh),
            **group,
        ),
        "other columns": ce(weight=data.weight[:, : 19 - rank], hidden=data.hidden[:, : 19 - rank]),
        "hidden needs grad on rank 0": ce(hidden=data.hidden.clone().requires_grad_(rank == 0)),
        "weight needs grad on rank 0": ce(weight=data.weight.clone().requires_grad_(rank == 0)),
        "bias on rank 0": ce(bias=data.bias if rank == 0 else None),
        "adapter on rank 0": ce(options=group | ({"lora": (a, b, 2.0)} if rank == 0 else {})),
        "A needs grad on rank 0": ce(options=group | {"lora": (a.clone().requires_grad_(rank == 0), b, 2.0)}),
        "other A": ce(options=group | {"lora": (a + rank, b, 2.0), "check": True}),
        "other workspace": ce(options=group | {"workspace_mib": 1.0 + rank}),
        "no reduction on rank 0": ce(options=group | {"reduction": "none" if rank == 0 else "mean"}),
        "other smoothing": ce(options=group | {"label_smoothing": 0.25 * rank}),
        "other z_loss": ce(options=group | {"z_loss": 0.25 * rank}),
        "no reduction of a distillation on rank 0": lambda: linear_distillation_loss(
            data.hidden,
            data.weight,
            data.teacher_ids,
            data.teacher,
            reduction="none" if rank == 0 else "sum",
            **group,
        ),
        "tail on rank 0": ce(options=group | {"tail_eps": 0.01 if rank == 0 else None}),
        "other hidden": ce(options=group | {"check": True}, hidden=data.hidden + rank),
        "other ids": ce(options=group | {"check": True}, ids=torch.where(data.ids < 0, rank, data.ids)),
        "other ids, first call": ce(weight=data.weight.clone(), ids=data.ids.roll(rank)),
        "other ids, compiled": lambda: one_graph(data.hidden, data.weight, data.ids.roll(rank)),
        "other hidden, compiled": torch.compile(
            ce(options=group | {"check": True}, hidden=data.hidden + rank),
            fullgraph=True,
            backend="aot_eager",
        ),
        "whole weight": ce(weight=whole.weight, bias=None),
        "whole weight, compiled": lambda: one_graph(data.hidden, whole.weight, data.ids),
        "ids": ce(ids=torch.full_like(data.ids, V)),
        "screen": ce(options=group | {"screen": True}),
        "lora beside a DTensor": ce(
            options={"lora": (data.lora_a, data.lora_b, 0.5)},
            hidden=distribute_tensor(whole.hidden, mesh, [Replicate()]),
            weight=by_rows,
            bias=None,
        ),
        "whole reference": dpo(whole.weight),
        "whole reference of zeros": dpo(torch.zeros_like(whole.weight)),
        "sample": lambda: sample(distribute_tensor(whole.weight, mesh, [Shard(0)]), seed=0),
        "logits": lambda: cross_entropy(distribute_tensor(whole.weight, mesh, [Shard(1)]), whole.ids),
        "Liger's JSD": lambda: LigerFusedLinearJSD()(
            data.hidden, by_rows, data.hidden, whole.weight, data.ids
        ),
        "class probabilities": lambda: torch_linear_cross_entropy(
            whole.hidden, by_rows, whole.hidden.new_ones(whole.ids.numel(), V)
        ),
        "tail report": lambda: tail_report(data.hidden, by_rows, data.ids, tail_eps=0.1),
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = "nothing"
        except ValueError as error:
            found[name] = str(error)
    return found
