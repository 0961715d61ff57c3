"""What each rank computes for the tests of the sharded head: a script, `sharded_ranks.py FOLDER RANK RANKS`.

Each rank writes FOLDER/RANK.pt: the results of all cases, and what the further checks found.
"""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fastalign import nn as losses
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
from tests.linear.sharded_cases import CASES, TIGHT, Case, Data, Result, V, run, tensors
from tests.two_ranks import be_a_rank

LAYOUTS: dict[int, dict[str, tuple[int, ...]]] = {
    1: {"one rank": (V,)},
    2: {"uneven": (40, 83), "empty": (0, V)},
    4: {"even": (31, 31, 31, 30), "uneven": (1, 2, 3, 117), "empty": (0, 61, 0, 62)},
}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32}
WORKSPACES = {"one chunk": None, "chunks": TIGHT}
TAIL = 0.02
# What torch's functional collectives call.
_BELOW = ("c10d::allgather_into_tensor_coalesced_", "c10d::allreduce_")


def rows_of(rows: tuple[int, ...], rank: int) -> slice:
    """The ids of a rank."""
    return slice(sum(rows[:rank]), sum(rows[: rank + 1]))


def local_data(rows: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Data:
    return Data.drawn(dtype).of_rows(rows_of(rows, dist.get_rank()))


def all_cases(layouts: dict[str, tuple[int, ...]]) -> dict[tuple[str, ...], Result]:
    """Results by layout, case, dtype and workspace."""
    found: dict[tuple[str, ...], Result] = {}
    for layout, rows in layouts.items():
        for dtype, torch_dtype in DTYPES.items():
            data = local_data(rows, torch_dtype)
            for name, case in CASES.items():
                for workspace, mib in WORKSPACES.items():
                    options: dict[str, Any] = {"group": dist.group.WORLD, "workspace_mib": mib}
                    found[layout, name, dtype, workspace] = run(case, data, **options)
    return found


def tail_case(name: str) -> Case:
    """A case that the tail serves: no smoothing beside a softcap."""
    case = CASES[name]
    return case._replace(options=case.options | {"softcap": None}) if "all options" in name else case


def tails(layouts: dict[str, tuple[int, ...]]) -> dict[tuple[str, str], Result]:
    """Cases with tail_eps, by layout and case."""
    names = ("cross-entropy", "cross-entropy, all options", "logprobs", "logprobs, frozen head", "dpo")
    options: dict[str, Any] = {"group": dist.group.WORLD, "tail_eps": TAIL, "workspace_mib": TIGHT}
    found = {}
    for layout, rows in layouts.items():
        for name in names:
            found[layout, name] = run(tail_case(name), local_data(rows), **options)
    return found


def counted(rows: tuple[int, ...]) -> dict[str, list[tuple[str, int]]]:
    """The collectives of each case, by torch's profiler: their names, and the elements that a rank sends."""
    calls = {}
    for name, case in CASES.items():
        data = local_data(rows).trained(case.trained)
        for workspace, mib in WORKSPACES.items():
            calls[f"{name}, {workspace}"] = case, data, mib
    for case, data, mib in calls.values():
        _train(case, data, mib)  # the first call tells the rows of all ranks
    with torch.profiler.profile(record_shapes=True) as profile:
        for name, (case, data, mib) in calls.items():
            with torch.profiler.record_function(f"case: {name}"):
                _train(case, data, mib)
    found: dict[str, list[tuple[str, int]]] = {}
    # Not profile.events(), which takes ten seconds to make a tree of them.
    events = profile.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        name = event.name()
        if name.startswith("case: "):
            found[name.removeprefix("case: ")] = case_events = []
        elif name.startswith("_c10d_functional::") and not name.endswith("wait_tensor"):
            elements = torch.Size(event.shapes()[0]).numel()
            case_events.append((name.removeprefix("_c10d_functional::"), elements))
        elif name.startswith("c10d::") and name not in _BELOW:
            case_events.append((name, -1))
    return found


def _train(case: Case, data: Data, mib: float | None) -> None:
    found = case.ours(data, **case.options, group=dist.group.WORLD, workspace_mib=mib)
    first = found if isinstance(found, Tensor) else found[0]
    if first.requires_grad:
        first.sum().backward()


def refusals() -> dict[str, str]:
    """What the first ranks are told, by what is wrong."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    data = local_data((40, 83) if ranks == 2 else (V,) * ranks)
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


def full(grad: Tensor | None) -> Tensor:
    assert grad is not None
    return grad.full_tensor() if isinstance(grad, DTensor) else grad


def dtensors() -> dict[str, Result]:
    """A loss and its whole gradients of DTensors: by what hidden is."""
    whole = Data.drawn(torch.float64)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    placements = {"a tensor": None, "replicated": Replicate(), "sharded tokens": Shard(0)}
    found = {}
    for name, placement in placements.items():
        weight, bias = (
            distribute_tensor(x, mesh, [Shard(0)]).requires_grad_() for x in (whole.weight, whole.bias)
        )
        hidden = (
            whole.hidden.clone() if placement is None else distribute_tensor(whole.hidden, mesh, [placement])
        )
        hidden.requires_grad_()
        ids = collectives.broadcast(whole.ids, 0, mesh)  # a subclass of Tensor that waits when it is read
        loss = linear_cross_entropy(hidden, weight, ids, bias, label_smoothing=0.1)
        grads = torch.autograd.grad(-loss, (hidden, weight, bias))
        found[name] = Result([loss.detach()], [full(grad) for grad in grads])
    return found


def mesh_dimension(rows: tuple[int, ...]) -> Tensor:
    """A loss over one dimension of a mesh, in the module."""
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("dp", "tp"))
    module = losses.LinearCrossEntropyLoss(group=mesh["tp"], label_smoothing=0.1)
    return module(*tensors(local_data(rows)))


def compiled(rows: tuple[int, ...]) -> dict[str, Result]:
    """Cases in one graph."""
    found = {}
    for name in ("cross-entropy, all options", "logprobs"):
        case = CASES[name]
        graph = torch.compile(case.ours, fullgraph=True, backend="aot_eager")
        found[name] = run(case._replace(ours=graph), local_data(rows), group=dist.group.WORLD)
    return found


class HiddenOnly(torch.nn.Linear):
    """A model whose loss is computed outside of its forward."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.clone()


def gathered() -> Result:
    """The loss of all ranks, in one graph outside of a model under FSDP2, and the head's gradients."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    data = Data.drawn(torch.float64)
    model = HiddenOnly(19, V, dtype=torch.float64)
    model.load_state_dict({"weight": data.weight, "bias": data.bias})
    fully_shard(model)
    tokens = rows_of((5, data.ids.numel() - 5), rank)  # each rank's own
    loss = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    hidden = model(data.hidden[tokens].requires_grad_())  # FSDP2 gathers the weight
    found = loss(hidden, model.weight, data.ids[tokens], model.bias, num_items=1.0)
    (-ranks * found).backward()  # `run` has an upstream gradient of -1, and FSDP2 averages
    dist.all_reduce(total := found.detach().clone())
    return Result([total], [full(x.grad) for x in (model.weight, model.bias)])


def nothing_to_average(rows: tuple[int, ...]) -> dict[str, Result]:
    """N = 0, and tokens that are all ignored."""
    data = local_data(rows)
    none = data._replace(hidden=data.hidden[:0], ids=data.ids[:0])
    case = CASES["cross-entropy"]
    options: dict[str, Any] = {"group": dist.group.WORLD}
    ignored = data._replace(ids=torch.full_like(data.ids, -100))
    return {
        "no tokens, num_items": run(case, none, num_items=3.0, **options),
        "no tokens": run(case, none, **options),
        "ignored, num_items": run(case, ignored, num_items=3.0, **options),
        "ignored": run(case, ignored, **options),
    }


def run_rank(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    ranks = int(sys.argv[3])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=60),  # a rank that waits for a chunk that no other has ends here
    )
    layouts = LAYOUTS[ranks]
    first = next(iter(layouts.values()))
    found = {
        "cases": all_cases(layouts),
        "tails": tails(layouts),
        "nothing": nothing_to_average(first),
        "mesh": mesh_dimension(first),
        "dtensors": dtensors(),
        "counted": counted(first),
    }
    if ranks == 2:
        found |= {"refusals": refusals(), "compiled": compiled(first), "gathered": gathered()}
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()


if __name__ == "__main__":
    be_a_rank(run_rank)
