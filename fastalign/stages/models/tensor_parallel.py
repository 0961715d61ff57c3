"""Layers split over the ranks of a tensor-parallel group, by the model's own plan (transformers' tp_plan).

The ranks of a group read the same rows. In front of a split layer each holds the same hidden states, so the
same loss and the same gradients of all weights that are not split. transformers' parallel styles split the
weights into DTensors and do the collectives. One style is ours: `replicated_with_grad_allreduce`, for the
norms of single heads, because transformers' sums gradients over the ranks that were summed before when
micro-batches accumulate.
"""

import importlib.util
import re
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PretrainedConfig, PreTrainedModel

from ...parallel_heads import behind_fused
from ...peft_heads import is_lora, wrapped_head
from ...servable_heads import without_peft
from .main_values import receive_values

# Styles of the experts of a mixture and of layers that hold several projections are not tested, so not here.
COLUMNS = ("colwise", "colwise_rep", "colwise_gather_output")
ROWS = ("rowwise", "rowwise_rep", "rowwise_split_input")
EMBEDDING = "embedding_rowwise"
NORM = "replicated_with_grad_allreduce"
SERVED = (*COLUMNS, *ROWS, EMBEDDING, NORM)


def check_plan(architecture: PretrainedConfig, size: int) -> None:
    """Raise ValueError if a model cannot be split over `size` ranks.

    That is one without a plan, with a style that is not served, or with heads that `size` does not divide.
    """
    if importlib.util.find_spec("transformers.distributed.tensor_parallel") is None:
        raise ValueError(
            f"tp: got {size} with transformers {transformers.__version__}, expected one that has "
            "transformers.distributed.tensor_parallel, such as 5.24"
        )
    text = architecture.get_text_config()
    plan = getattr(text, "base_model_tp_plan", None)
    kind = architecture.model_type
    if not plan:
        raise ValueError(
            f"tp: got {size}, expected 1: transformers {transformers.__version__} has no tensor-parallel "
            f"plan (base_model_tp_plan) for {kind}"
        )
    if foreign := sorted({*plan.values()} - {*SERVED}):
        raise ValueError(
            f"tp: got {size}, expected 1: the plan of {kind} has {', '.join(foreign)}, and the stages serve "
            f"{', '.join(SERVED)}"
        )
    heads = {name: getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads")}
    uneven = {name: count for name, count in heads.items() if isinstance(count, int) and count % size}
    if uneven and "colwise" in plan.values():  # else each rank has all heads
        counts = " and ".join(f"{name}={count}" for name, count in uneven.items())
        raise ValueError(f"tp: got {size}, expected a divisor of the model's {counts}")


def parallelize(model: nn.Module, mesh: DeviceMesh) -> None:
    """Split rank 0's whole model in place: each rank keeps its part of each layer that the plan names.

    Weights that an embedding and lm_head share stay shared. LoRA's factors are split as their layers are: of
    a layer split by columns B, of one split by rows A. Raises ValueError for adapters on other modules.
    """
    base = without_peft(model)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if wrapped_head(head) is not None:
        raise ValueError(
            f"lora_targets: got the head of {type(base).__name__} with tp={mesh.size()}, expected other "
            "modules: the vocabulary of a head with adapters cannot be split"
        )
    tied = head is not None and head.weight is embedding.weight
    device = torch.device(mesh.device_type)
    for name, style in module_styles(base).items():
        module = base.get_submodule(name)
        receive_values(module, device)
        if is_lora(module):
            _split_adapted(module, style, mesh)
        elif hasattr(module, "base_layer"):
            raise ValueError(
                f"lora_targets: got adapters of {type(module).__name__} on {name}, which tp={mesh.size()} "
                f"splits as {style}, expected LoRA on linear layers alone"
            )
        else:
            with behind_fused(module):
                _split(module, style, mesh)
    if tied:
        head.weight = embedding.weight


def module_styles(base: PreTrainedModel) -> dict[str, str]:
    """The modules that the plan splits, and the style of each."""
    plan: dict[str, str] = dict(base.tp_plan or {})
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    names = {module: name for name, module in base.named_modules()}
    if head is not None and head.weight is embedding.weight:
        plan = {names[embedding]: EMBEDDING, names[head]: COLUMNS[-1]} | plan
    styles = {name: plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name)) for name in names.values()}
    found = {name: style for name, style in styles.items() if style is not None}
    if foreign := sorted({*found.values()} - {*SERVED}):
        raise ValueError(
            f"tp: got a plan of {type(base).__name__} with {', '.join(foreign)}, expected one of "
            f"{', '.join(SERVED)} alone"
        )
    return found


def local_share(model: nn.Module, size: int) -> float:
    """The share of a whole model's elements that one of `size` ranks keeps, about."""
    if size == 1:
        return 1.0
    base = without_peft(model)
    split = {
        weight
        for name, style in module_styles(base).items()
        if style != NORM
        for weight in base.get_submodule(name).parameters()
    }
    elements = sum(weight.numel() for weight in model.parameters())
    return 1 - sum(weight.numel() for weight in split) / elements * (1 - 1 / size)


def _split(module: nn.Module, style: str, mesh: DeviceMesh) -> None:
    """Split one module's weights, and let its forward do the collectives."""
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    if style == NORM:
        _sum_gradients(module, mesh)
        return
    layer = ALL_PARALLEL_STYLES[style]
    for name, _ in [*module.named_parameters(recurse=False)]:
        layer.shard_param(module, name, mesh)
    layer.install_forward(module, mesh)


def _split_adapted(module: Any, style: str, mesh: DeviceMesh) -> None:
    """Split a linear layer and the factor of its LoRA that has its split side.

    Ranks with parts of different widths would draw different numbers for dropout, and from then on drop
    different hidden states.
    """
    drops = any(getattr(dropout, "p", 0) for dropout in module.lora_dropout.values())
    if drops and style in ROWS and module.in_features % mesh.size():
        raise ValueError(
            f"lora_dropout: got dropout with tp={mesh.size()} on a layer of width {module.in_features}, "
            "expected 0, or a width that tp divides"
        )
    _split(module.base_layer, style, mesh)
    for factor in (module.lora_B if style in COLUMNS else module.lora_A).values():
        _split(factor, style, mesh)


class _SumGradient(torch.autograd.Function):
    """A tensor, whose gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        summed = gradient.clone()
        dist.all_reduce(summed, group=ctx.group)
        return summed, None


def _sum_gradients(module: nn.Module, mesh: DeviceMesh) -> None:
    """Let a module that sees this rank's heads alone have the gradient of all heads."""
    forward, group = module.forward, mesh.get_group()

    def summed_forward(*args: Any, **kwargs: Any) -> Any:
        weights = dict(module._parameters)
        for name, weight in weights.items():
            if weight is not None and weight.requires_grad and torch.is_grad_enabled():
                module._parameters[name] = _SumGradient.apply(weight, group)
        try:
            return forward(*args, **kwargs)
        finally:
            module._parameters.update(weights)

    module.forward = summed_forward
