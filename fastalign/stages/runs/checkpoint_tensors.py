"""What a checkpoint holds, as tensors by name.

    model.NAME: a trained weight or a buffer.
    optimizer.NAME.KEY: AdamW's state of that weight.
    random.RANK.KEY: the random states of a rank.

Names are those of the model, so a weight is found again on another number of ranks. Weights of FSDP2 are
DTensors, of which each rank writes and reads its own shard.
"""

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import DTensor

from .distributed import World


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training changes. Frozen weights (LoRA's base) come from where they came from the first time."""
    saved = model.state_dict().keys()
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    return weights | {name: buffer for name, buffer in model.named_buffers() if name in saved}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state, which torch creates if there was no step yet. Rates are the configuration's."""
    state: Any = get_optimizer_state_dict(model, optimizer)["state"]
    return {f"{name}.{key}": value for name, values in state.items() for key, value in values.items()}


def random_tensors(world: World) -> dict[str, Tensor]:
    """This rank's random states: Python's, torch's and its GPU's."""
    version, internal, gauss = random.getstate()
    numbers = [version, *internal]
    tensors = {
        "python": torch.tensor(numbers, dtype=torch.int64),
        "gauss": torch.tensor([gauss is not None, gauss or 0.0], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if world.device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(world.device)
    return tensors


def set_random_states(tensors: dict[str, Tensor], world: World) -> None:
    """Set what `random_tensors` gave."""
    version, *internal = tensors["python"].tolist()
    drawn, gauss = tensors["gauss"].tolist()
    random.setstate((version, tuple(internal), gauss if drawn else None))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], world.device)


def describe_layout(model: nn.Module, world: World) -> str:
    """How the model lies on the ranks, such as "4 processes (dp_replicate 2, dp_shard 2)"."""
    meshes = {weight.device_mesh for weight in model.parameters() if isinstance(weight, DTensor)}
    if not meshes:
        return f"{world.size} processes"
    # Weights that tensor parallelism does not split lie on the data dimensions of the mesh alone.
    largest = max(meshes, key=lambda mesh: mesh.ndim)
    names = largest.mesh_dim_names or ("shard",) * largest.ndim
    sizes = zip(names, largest.shape, strict=True)
    return f"{world.size} processes ({', '.join(f'{name} {size}' for name, size in sizes)})"


def local_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor that this rank holds."""
    return tensor.to_local().nbytes if isinstance(tensor, DTensor) else tensor.nbytes
