"""The head's tensors as DTensors: which are served, and the part of this rank."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..torch_func import assumed_constant

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh, ProcessGroup


def group_of_rows(argument: str, x: Any) -> ProcessGroup:
    """The group over which the rows of x are sharded. Raises ValueError for another placement."""
    from torch.distributed.tensor import Shard

    mesh = x.device_mesh
    dimensions = [dim for dim in range(mesh.ndim) if mesh.size(dim) > 1] or [0]
    placement = x.placements[dimensions[0]]
    # a subclass of Shard, as FSDP2 beside tensor parallelism makes it, interleaves the rows
    if len(dimensions) > 1 or type(placement) is not Shard or placement.dim != 0:
        raise ValueError(
            f"{argument}: got a DTensor with placements {x.placements} on a mesh of {tuple(mesh.shape)}, "
            "expected rows sharded over one mesh dimension alone, (Shard(dim=0),), or a plain tensor"
        )
    return mesh.get_group(dimensions[0])


def local_rows(x: Any) -> Tensor:
    """The rows of this rank; their gradient is theirs alone."""
    return x.to_local(grad_placements=x.placements)


def replicated(hidden: Any, group: ProcessGroup) -> Tensor:
    """Hidden states of all tokens; DTensor sums the ranks' gradients."""
    from torch.distributed.tensor import Partial, Replicate

    mesh = hidden.device_mesh
    if mesh.ndim != 1 or mesh.get_group().group_name != group.group_name:
        raise ValueError(
            f"hidden: got a DTensor on a mesh of {tuple(mesh.shape)}, expected the one-dimensional mesh over "
            "which weight is sharded, or a plain tensor"
        )
    if hidden.placements != (Replicate(),):
        hidden = hidden.redistribute(placements=[Replicate()])
    return hidden.to_local(grad_placements=[Partial()])


# FSDP2.


def refuse_fsdp(weight: Any) -> None:
    """Raise ValueError for a parameter that FSDP2 shards, and for what is computed from one.

    It is a DTensor sharded by rows, as one of tensor parallelism is, but each rank has other tokens.
    """
    if _shards_a_model(weight.device_mesh):
        raise ValueError(
            "weight: got a parameter that FSDP2 shards, each of whose ranks has other tokens, expected "
            "the gathered weight: call the loss inside of the model's forward, as fuse_head does, or "
            "leave lm_head to the outermost fully_shard, with reshard_after_forward=False; if all ranks have "
            "the same tokens, pass weight.to_local() and group="
        )


@assumed_constant
def _shards_a_model(mesh: DeviceMesh) -> bool:
    """Whether FSDP2 shards a model's parameters over this mesh.

    FSDP2 marks neither its parameters nor their mesh, so this looks through the state of every module that
    has one. What is computed from a parameter is a DTensor on the same mesh. Compiled code asks when it is
    traced, where the mesh is known and the parameter's identity is not.
    """
    states = sys.modules.get("torch.distributed._composable_state")
    for reference in list(states._module_state_mapping.values()) if states else ():
        state = reference()
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        parameters = [parameter for group in groups if group is not None for parameter in group.fsdp_params]
        if any(
            getattr(parameter.mesh_info, "shard_mesh_size", 1) > 1
            and parameter.sharded_param.device_mesh == mesh
            for parameter in parameters
        ):
            return True
    return False
