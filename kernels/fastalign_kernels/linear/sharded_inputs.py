"""The head of this rank, from `group=` or from DTensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from .sharded import Shards
from .sharded_agreement import KNOWN, OfCall, facts_of, rows_of_ranks
from .sharded_dtensors import group_of_rows, local_rows, refuse_fsdp, replicated

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LocalHead(NamedTuple):
    """The tensors of a head call on this rank."""

    hidden: Tensor  # [..., H]
    weight: Tensor  # [V_r, H]
    bias: Tensor | None  # [V_r]
    shards: Shards | None  # None: the weight is whole
    group: str  # its name; "" if the weight is whole


def local_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Callable[[], Tensor], call: OfCall
) -> LocalHead:
    """The head of this rank. Without a group and without DTensors it is as given.

    The number of each rank's rows is not known here, so the first call with a weight asks the other ranks, as
    does the first with other gradients or options: one all-gather of 152 bytes, which waits for the device.
    The answer is kept for that tensor: pass the parameter itself, not a view that is made for each call. That
    call also compares the ids and some rows of the weight. Compiled code asks when it is traced, and compares
    ids and rows when it first runs.

    Raises:
        ValueError: a group that is no process group or not initialised; a DTensor that is not sharded by rows
            over one mesh dimension, or beside tensors that are not; a weight that FSDP2 shards; ranks that
            differ in what `Facts` names, or in the ids of a first call, or all have the same rows.
    """
    group = call.group
    if group is None and not (checks.is_dtensor(weight) or checks.is_dtensor(hidden)):
        return LocalHead(hidden, weight, bias, None, "")
    given = weight
    if checks.is_dtensor(weight):
        if torch.compiler.is_compiling() or weight not in KNOWN:
            refuse_fsdp(weight)
        of_weight = group_of_rows("weight", weight)
        group = _same_group(of_weight, group)
        weight = local_rows(weight)
    if group is None:
        raise ValueError(
            "hidden: got a DTensor with a weight that is none, expected a plain tensor: hidden.to_local()"
        )
    process_group = _process_group(group)
    if bias is not None and checks.is_dtensor(bias) != checks.is_dtensor(given):
        raise ValueError("bias: got a DTensor beside a plain tensor, expected it sharded as weight is")
    if bias is not None and checks.is_dtensor(bias):
        _same_group(group_of_rows("bias", bias), process_group)
        bias = local_rows(bias)
    reduces_hidden = not checks.is_dtensor(hidden)
    if not reduces_hidden:
        hidden = replicated(hidden, process_group)
    name, rank, size = process_group.group_name, process_group.rank(), process_group.size()
    facts = facts_of(hidden, weight, bias, call)
    rows = rows_of_ranks(given, weight, ids, facts, name, size)
    if checks.is_dtensor(given) and sum(rows) != given.shape[0]:
        raise ValueError(
            f"weight: got shards of {list(rows)} rows, expected {given.shape[0]} in all, as the DTensor says"
        )
    if sum(rows) == 0:
        raise ValueError("weight: got no rows on any rank of group, expected [V_r, H] on each")
    return LocalHead(hidden, weight, bias, Shards(rank, reduces_hidden, rows), name)


# Process groups.


def check_group(group: object) -> None:
    """A process group, a DeviceMesh of one dimension, or None."""
    if group is None:
        return
    if torch.distributed.is_available():
        if isinstance(group, torch.distributed.ProcessGroup):
            return
        if isinstance(group, torch.distributed.DeviceMesh):
            if group.ndim == 1:
                return
            raise ValueError(
                f"group: got a DeviceMesh of {group.ndim} dimensions {group.mesh_dim_names}, expected one "
                "dimension of it: mesh['tp']"
            )
    raise ValueError(
        f"group: got {checks.shown(group)}, expected a torch.distributed.ProcessGroup, one dimension of a "
        "DeviceMesh, or None"
    )


def _process_group(group: Any) -> ProcessGroup:
    """The process group of `group=`, which `check_group` has seen. Raises ValueError."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        raise ValueError(
            f"group: got {checks.shown(group)} before torch.distributed was initialised, expected "
            "init_process_group first"
        )
    if isinstance(group, torch.distributed.DeviceMesh):
        group = group.get_group()
    if not torch.compiler.is_compiling() and group not in torch.distributed.distributed_c10d._world.pg_map:
        raise ValueError("group: got a process group that was destroyed, expected one that is initialised")
    return group


def _same_group(found: ProcessGroup, group: Any) -> ProcessGroup:
    """The group of a DTensor, if `group` is it or None."""
    if group is not None and _process_group(group).group_name != found.group_name:
        raise ValueError("group: got another process group than the DTensor's, expected None or that group")
    return found
