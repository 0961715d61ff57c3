"""Models that rank 0 alone loads: the other ranks get its modules without values, then rank 0's values.

So a machine reads one copy of a model that its ranks share, and not one for each rank.
"""

import copy
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Model = TypeVar("Model", bound=nn.Module)


def has_values(model: nn.Module) -> bool:
    """Whether this rank has the model's weights."""
    return not any(weight.is_meta for weight in model.parameters())


def without_values(model: Model) -> Model:
    """A copy of the model whose weights are on the meta device."""
    weights: dict[int, Any] = {
        id(weight): nn.Parameter(torch.empty_like(weight, device="meta"), weight.requires_grad)
        for weight in model.parameters()
    }
    return copy.deepcopy(model, weights)


def receive_values(module: nn.Module, device: torch.device) -> None:
    """Give the weights and buffers of a module rank 0's values, on `device`. All ranks call it.

    Those that are shards already stay as they are. What several names share is sent once and stays shared.
    """
    received: dict[int, Tensor] = {}
    for part in module.modules():
        held: list[dict[str, Any]] = [part._parameters, part._buffers]
        for tensors in held:
            for name, tensor in tensors.items():
                if tensor is not None and not isinstance(tensor, DTensor):
                    if id(tensor) not in received:
                        received[id(tensor)] = _received(tensor, device)
                    tensors[name] = received[id(tensor)]


def _received(tensor: Tensor, device: torch.device) -> Tensor:
    main = dist.get_rank() == 0
    value = (
        tensor.detach().to(device).contiguous()
        if main
        else torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    )
    dist.broadcast(value.reshape(-1).view(torch.uint8), 0)  # bytes, because gloo has no bool
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
