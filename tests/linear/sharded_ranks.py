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
from fastalign.integrations.liger import LigerFusedLinearDPOLoss, LigerFusedLinearKTOLoss
from fastalign_kernels import (
    linear_cross_entropy,
)
from tests.linear.sharded_cases import CASES, TIGHT, Case, Data, Result, V, run, tensors
from tests.linear.sharded_refusals import refusals
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


def liger() -> dict[str, list[Tensor]]:
    """What Liger's losses of pairs and of KTO return of a whole head, and of the same one as DTensors."""
    whole = Data.drawn(torch.float64)
    rows, ids = whole.hidden.view(4, -1, 19), whole.ids.view(4, -1)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    heads = {
        "whole": (whole.weight, whole.bias),
        "sharded": tuple(distribute_tensor(x, mesh, [Shard(0)]) for x in (whole.weight, whole.bias)),
    }
    dpo, kto = LigerFusedLinearDPOLoss(use_ref_model=False), LigerFusedLinearKTOLoss(use_ref_model=False)
    desirable = torch.tensor([True, False, True, False])
    found = {}
    for name, (weight, bias) in heads.items():
        loss, beside = dpo(weight, rows, ids, bias)
        of_kto, sums = kto(rows, weight, ids, bias, preference_labels=desirable)
        found[name] = [loss, *beside, of_kto, *sums]
    return found


def mesh_dimension(rows: tuple[int, ...]) -> Tensor:
    """A loss over one dimension of a mesh, in the module."""
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("dp", "tp"))
    module = losses.LinearCrossEntropyLoss(group=mesh["tp"], label_smoothing=0.1)
    return module(*tensors(local_data(rows)))


def compiled(rows: tuple[int, ...]) -> dict[str, Result]:
    """Cases in one graph, of these sizes or of any."""
    found = {}
    for name, dynamic in {"cross-entropy, all options": None, "logprobs": True}.items():
        case = CASES[name]
        graph = torch.compile(case.ours, fullgraph=True, backend="aot_eager", dynamic=dynamic)
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
        "liger": liger(),
        "counted": counted(first),
    }
    if ranks == 2:
        found |= {
            "refusals": refusals(local_data(first)),
            "compiled": compiled(first),
            "gathered": gathered(),
        }
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()


if __name__ == "__main__":
    be_a_rank(run_rank)
