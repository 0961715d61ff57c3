"""Models sharded over ranks by torch's FSDP2: from a configuration to its mesh, from a model to its shards.

This file and tensor_parallel.py alone know how weights lie on ranks. `dp_shard` ranks hold one copy of the
weights, gradients and optimizer state between them, and `dp_replicate` such groups train on other rows. `tp`
ranks share each layer and train on the same rows: a mesh (dp_replicate, dp_shard, tp). With dp_shard=1 and
tp=1 nothing here changes a model, and DistributedDataParallel averages its gradients.

What is gathered, in one micro-batch with L layers:

    each layer: all-gathered in the forward pass and once more in the backward pass.
    the embedding, if the head does not share it: all-gathered in the forward pass alone.
    the head: all-gathered once, for its forward and backward pass and all its chunks.
    what is left (the last norm, a tied embedding, a classifier's score): all-gathered once.

Gradients are reduce-scattered once a step, in the backward pass of the last micro-batch.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from ...servable_heads import without_peft
from ..config import TrainConfig
from .main_values import receive_values
from .tensor_parallel import parallelize

Model = TypeVar("Model", bound=nn.Module)
# What `accelerate launch` sets for engines of its own, which would shard beside ours or instead of it.
_ENGINES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed (ZeRO)",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config",
}


@dataclass(frozen=True)
class Sharding:
    """How the models of a run are sharded."""

    device: torch.device
    mesh: DeviceMesh | None
    """FSDP2's: (dp_shard), or (dp_replicate, dp_shard) if there are several groups; None: tp alone shards."""
    precision: MixedPrecisionPolicy
    offload: OffloadPolicy
    tp: DeviceMesh | None = None
    """The ranks that share this rank's layers; None: each rank has whole layers."""
    dp_group: dist.ProcessGroup | None = None
    """With tp: the ranks that train on other rows and hold the same part of each layer."""

    @property
    def tp_size(self) -> int:
        """Ranks that share a layer."""
        return 1 if self.tp is None else self.tp.size()


def refuse_engines() -> None:
    """Raise ValueError if `accelerate launch` was told to shard, which the stages would not obey."""
    for variable, engine in _ENGINES.items():
        if os.environ.get(variable, "").lower() in ("true", "1", "yes", "y", "on", "t"):
            raise ValueError(
                f"{variable}: got {os.environ[variable]}, expected a launch without accelerate's {engine}: "
                "the stages shard with torch's FSDP2 (dp_shard=N) under torchrun or a plain accelerate launch"
            )


def plan_sharding(config: TrainConfig, size: int, device: torch.device) -> Sharding | None:
    """The sharding of a run on `size` ranks; None if each rank has whole models.

    Raises ValueError with the numbers if the mesh does not fit the ranks.
    """
    refuse_engines()
    tp, shard = config.tp, config.dp_shard
    replicate = max(size // (shard * tp), 1) if config.dp_replicate is None else config.dp_replicate
    if replicate * shard * tp != size:
        raise ValueError(_misfit(config, replicate, size))
    if shard == tp == 1:
        return None
    names = ("dp_replicate", "dp_shard", "tp")[: 2 if tp == 1 else 3]
    # The norm of gradients in the host's memory is summed there.
    offloads = config.cpu_offload and device.type == "cuda"
    backends: dict[int | str, Any] = dict.fromkeys(names, "cpu:gloo,cuda:nccl") if offloads else {}
    mesh = init_device_mesh(
        device.type,
        (replicate, shard, tp)[: len(names)],
        mesh_dim_names=names,
        backend_override=backends or None,
    )
    # Inputs keep their types: PPO's log-probabilities and advantages are fp32, and autocast casts the rest.
    half = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if config.bf16 else {}
    groups = [[*range(first, size, tp)] for first in range(tp)]
    return Sharding(
        device,
        _data_mesh(mesh, replicate=replicate, shard=shard),
        MixedPrecisionPolicy(**half, cast_forward_inputs=False),
        CPUOffloadPolicy(pin_memory=device.type == "cuda") if config.cpu_offload else OffloadPolicy(),
        tp=mesh["tp"] if tp > 1 else None,
        dp_group=dist.new_subgroups_by_enumeration(groups)[0] if tp > 1 else None,
    )


def _misfit(config: TrainConfig, replicate: int, size: int) -> str:
    """Why a mesh does not fit `size` ranks."""
    tp, shard = config.tp, config.dp_shard
    axes, sizes = ["dp_replicate", "dp_shard"], [replicate, shard]
    if tp > 1:
        axes, sizes = [*axes, "tp"], [*sizes, tp]
    product = " x ".join(map(str, sizes))
    if size % tp:
        fitting = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
        remedy = f"tp may be {fitting}"
    else:
        fitting = ", ".join(str(n) for n in range(1, size // tp + 1) if size // tp % n == 0)
        remedy = f"dp_shard may be {fitting}, with dp_replicate={size // tp} / dp_shard"
    return (
        f"{'tp' if size % tp else 'dp_shard'}: got {' x '.join(axes)} = {product} = {replicate * shard * tp} "
        f"ranks, expected the {size} of this run (torchrun's WORLD_SIZE): {remedy}"
    )


def _data_mesh(mesh: DeviceMesh, *, replicate: int, shard: int) -> DeviceMesh | None:
    """The dimensions over which FSDP2 shards and replicates."""
    if replicate * shard == 1:
        return None
    return mesh["dp_replicate", "dp_shard"] if replicate > 1 else mesh["dp_shard"]


def shard(sharding: Sharding | None, model: Model) -> Model:
    """Shard a loaded model in place, layer by layer, and move it to the run's device. Rank 0 has its values.

    Tensor parallelism splits the layers, and FSDP2 shards what a rank then has. Call it after all checks that
    run parts of the model: from then on a forward pass is one of the whole model on all ranks. A sharded
    model stays as it is, and so does any if `sharding` is None.
    """
    if sharding is None or is_sharded(model):
        return model
    if sharding.tp is not None:
        parallelize(model, sharding.tp)
    if sharding.mesh is None:
        receive_values(model, sharding.device)
        return model
    base = without_peft(model)
    if isinstance(base, PreTrainedModel):
        _shard_parts(sharding, base)
    _shard_group(sharding, model, kept=True)
    return model


def _shard_parts(sharding: Sharding, base: PreTrainedModel) -> None:
    """Make a group of each layer, and of the embedding and the head if they do not share weights."""
    for module in _layers(base):
        _shard_group(sharding, module, kept=False)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if not _tied(base):
        lookup = type(embedding) is nn.Embedding
        # The gradient of a lookup does not read the table.
        _shard_group(sharding, embedding, kept=False).set_unshard_in_backward(not lookup)
        if head is not None:
            _shard_group(sharding, head, kept=True)


def _layers(base: PreTrainedModel) -> list[nn.Module]:
    """The modules that transformers names as wholes: the layers, of a vision tower too."""
    names = set(base._no_split_modules or ())
    layers = [module for module in base.modules() if type(module).__name__ in names]
    if not layers:
        warnings.warn(
            f"model: {type(base).__name__} names no layers (_no_split_modules), so a pass gathers all its "
            "weights at once",
            stacklevel=2,
        )
    return layers


def _tied(base: PreTrainedModel) -> bool:
    head = base.get_output_embeddings()
    return head is not None and bool({*head.parameters()} & {*base.get_input_embeddings().parameters()})


def gathered_weights(model: nn.Module) -> int:
    """Elements of a model that a forward and backward pass gathers at once: the head, and two layers.

    The second layer is the one that is gathered while the first computes.
    """
    base: Any = without_peft(model)
    layers = [sum(weight.numel() for weight in layer.parameters()) for layer in _layers(base)]
    rest = sum(weight.numel() for weight in model.parameters()) - sum(layers)
    embedding = (
        0 if _tied(base) else sum(weight.numel() for weight in base.get_input_embeddings().parameters())
    )
    return max(rest - embedding + 2 * max(layers, default=0), embedding)


def _shard_group(sharding: Sharding, module: nn.Module, *, kept: bool) -> FSDPModule:
    """Shard the weights of a module that no group inside of it holds.

    kept: they stay gathered between the forward and the backward pass.
    """
    receive_values(module, sharding.device)
    fully_shard(
        module,
        mesh=sharding.mesh,
        mp_policy=sharding.precision,
        offload_policy=sharding.offload,
        reshard_after_forward=not kept,
    )
    sharded: Any = module
    sharded.fastalign_kept, sharded.fastalign_whole = kept, False
    return cast(FSDPModule, module)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was called on the model or on a part of it."""
    return any(isinstance(weight, DTensor) for weight in model.parameters()) or bool(_groups(model))


def reshard(model: nn.Module) -> None:
    """Free what a forward pass left gathered for a backward pass, so that `parameters()` are the shards.

    A forward pass without gradients leaves the head gathered. Whoever takes parameters then, for an
    optimizer or for a norm, would hold copies that are freed later.
    """
    for module in _groups(model):
        module.reshard()


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Inside, a sharded model is whole on each rank, and ranks may run it as often as each likes.

    It is gathered once, on all ranks together, in the type of the mesh's mixed precision, and freed
    afterwards. A model that is not sharded stays as it is, and so does what is whole already.
    """
    modules: list[Any] = [module for module in _groups(model) if not cast(Any, module).fastalign_whole]
    for module in modules:
        module.fastalign_whole = True
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.fastalign_whole = False
            module.set_reshard_after_forward(not module.fastalign_kept, recurse=False)
            module.reshard()


@contextmanager
def accumulating(model: nn.Module, *, last: bool) -> Iterator[None]:
    """Backward passes inside add to the gradients; those of the last micro-batch are summed over ranks."""
    for module in _groups(model):
        module.set_requires_gradient_sync(last, recurse=False)
    with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext():
        yield


def clip_gradients(weights: Sequence[nn.Parameter], largest: float) -> float:
    """Scale the gradients down to the L2 norm `largest`, and return their norm before.

    A weight counts once, on however many ranks it lies. torch takes tensors of one mesh at a time.
    """
    layouts = [*by_mesh(weights).values()]
    if len(layouts) == 1:
        return float(whole_tensor(nn.utils.clip_grad_norm_(weights, largest)))
    gradients = [[weight.grad for weight in part if weight.grad is not None] for part in layouts]
    norms = [whole_tensor(nn.utils.get_total_norm(part)) for part in gradients]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    for part in layouts:
        nn.utils.clip_grads_with_norm_(part, largest, norm)
    return float(norm)


def by_mesh(weights: Sequence[nn.Parameter]) -> dict[DeviceMesh | None, list[nn.Parameter]]:
    """The weights of each mesh; None: those that lie whole on each rank."""
    found: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for weight in weights:
        found.setdefault(weight.device_mesh if isinstance(weight, DTensor) else None, []).append(weight)
    return found


def local_part(tensor: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor, or the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered on every rank, or the tensor. All ranks call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def adapters_to_save(model: nn.Module) -> dict[str, Tensor] | None:
    """What `save_pretrained(state_dict=…)` saves of sharded adapters on rank 0; None of a whole model.

    All ranks call it. The adapters are moved to rank 0's memory; the frozen base stays where it is.
    """
    if not is_sharded(model):
        return None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    return state


def part_to_save(model: nn.Module, writers: Sequence[int], rank: int) -> dict[str, Tensor]:
    """The whole tensors of a sharded model that this rank writes, in the host's memory.

    All ranks call it. The modules are divided among `writers` in their order, by bytes. Tensors are gathered
    one by one. Of weights that share a tensor the first name alone is written, as transformers does.
    """
    state: dict[str, Tensor] = model.state_dict()
    first: dict[nn.Parameter, str] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if first.setdefault(weight, name) != name:
            state.pop(name, None)
    modules: dict[str, list[str]] = {}
    for name in state:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    total, before, part = sum(tensor.nbytes for tensor in state.values()), 0, {}
    for names in modules.values():
        writer = writers[before * len(writers) // total]
        before += sum(state[name].nbytes for name in names)
        for name in names:
            tensor = whole_tensor(state[name]).detach()
            if writer == rank:
                part[name] = tensor.cpu()
    return part


def _groups(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
