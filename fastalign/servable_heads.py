"""The backbone and the lm_head of a causal LM, and the reasons why the fused head cannot serve a model.

An lm_head is a plain nn.Linear, or what PEFT makes of one: copies of it (modules_to_save), LoRA on it, or
single rows of it that are trained (peft_heads.py).
"""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .parallel_heads import is_parallel
from .peft_heads import explain_adapters, wrapped_head
from .probe import UnsupportedModelError, unsupported


def backbone(model: nn.Module) -> PreTrainedModel:
    """The module whose `last_hidden_state` enters the head of a causal LM or classifier.

    The model may be in a PeftModel.
    """
    found: PreTrainedModel = backbone_of(causal_lm_of(model))
    return found


def backbone_of(model: PreTrainedModel) -> Any:
    if model.base_model is model:  # the base_model_prefix names no module, as in Llama 4
        return getattr(model, "model", model)
    return model.base_model


def causal_lm_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model in `model` whose head is to be fused. Raises UnsupportedModelError."""
    base = without_peft(model)
    if isinstance(base, nn.DataParallel):
        raise unsupported(
            base, "copies a module without its fused forward", expected="DistributedDataParallel"
        )
    return transformers_model(model, remedy="fuse the head before DDP or torch.compile wraps the model")


def without_peft(model: Any) -> Any:
    """The model that PEFT's wrapper holds, or the model itself."""
    return getattr(model, "get_base_model", lambda: model)()


def transformers_model(model: Any, *, remedy: str) -> PreTrainedModel:
    """The transformers decoder in `model`. Raises UnsupportedModelError with `remedy` if there is none."""
    base = without_peft(model)
    if not isinstance(base, PreTrainedModel):
        raise unsupported(base, "is no transformers PreTrainedModel", expected=f"one: {remedy}")
    if base.config.is_encoder_decoder:
        raise unsupported(base, "is an encoder-decoder", expected="a causal LM")
    return base


def adapted_head(model: PreTrainedModel) -> nn.Module | None:
    """The wrapper with PEFT's adapters that calling the output embeddings runs, if they are one."""
    head = model.get_output_embeddings()
    return None if wrapped_head(head) is None else head


def heads_of(model: PreTrainedModel) -> list[nn.Module]:
    """All modules that calling the output embeddings may run and that fuse_head patches."""
    wrapper = adapted_head(model)
    return [*plain_heads(model), *([] if wrapper is None else [wrapper])]


def plain_heads(model: PreTrainedModel) -> list[nn.Linear]:
    """The nn.Linear modules that calling the output embeddings may run: one, or PEFT's copies of it.

    Raises UnsupportedModelError if they are none, or if PEFT's adapters on them cannot be served.
    """
    head = model.get_output_embeddings()
    if head is None or backbone_of(model) is model:
        raise unsupported(model, "has no output embeddings on a backbone", expected="a causal LM")
    if (wrapped := wrapped_head(head)) is not None:
        if (reason := explain_adapters(head)) is not None:
            raise unsupported(model, reason, expected="one plain LoRA adapter there, or none")
        head = wrapped
    copies = getattr(head, "modules_to_save", None)  # PEFT's ModulesToSaveWrapper passes all arguments on
    modules = [head] if copies is None else [head.original_module, *copies.values()]
    for module in modules:
        kind, weight = type(module), getattr(module, "weight", None)
        if not isinstance(module, nn.Linear) or kind.forward is not nn.Linear.forward:
            raise unsupported(
                model,
                f"has a {kind.__module__}.{kind.__qualname__} as its lm_head",
                expected="a plain nn.Linear, not quantised; PEFT's LoRA on it and modules_to_save are served",
            )
        if hasattr(weight, "ds_id"):
            raise unsupported(
                model,
                "has its lm_head.weight partitioned by DeepSpeed ZeRO-3",
                expected="FSDP2 (fully_shard), or DeepSpeed at a stage below 3",
            )
        if type(weight) is not nn.Parameter and not isinstance(weight, DTensor):
            raise unsupported(
                model,
                f"has a {type(weight).__name__} as its lm_head.weight (quantised?)",
                expected="an nn.Parameter",
            )
    return modules


def explain_unservable(model: PreTrainedModel) -> str | None:
    """Why the fused head cannot read lm_head, for example after an adapter was put on it; None if it can."""
    try:
        plain_heads(model)
    except UnsupportedModelError as error:
        return str(error)
    return None


def refuse_unservable(model: PreTrainedModel, heads: Sequence[nn.Module]) -> None:
    refuse_router_loss(model, None)
    if adapted_head(model) is not None and any(is_parallel(head) for head in plain_heads(model)):
        raise unsupported(
            model,
            f"has an adapter on an lm_head that is tensor-parallel over {model.tp_size} ranks",
            expected="no adapter there",
        )
    if scored_by_trl(model):
        raise unsupported(
            model,
            "got a forward of its own from a TRL trainer",
            expected="a model to fuse before that: fastalign.integrations.trl.patch() needs no fusing",
        )
    for module in (model, *heads):
        if "forward" in module.__dict__ and not is_parallel(module):
            raise unsupported(
                model,
                f"has the forward of its {type(module).__name__} replaced by {_name_of(module.forward)} "
                "(accelerate's device_map? another fused loss?)",
                expected="the forward of its class: undo that first",
            )


def scored_by_trl(model: PreTrainedModel) -> bool:
    """Whether a TRL trainer replaced the model's forward. functools.wraps hides that from its name."""
    return getattr(model.__dict__.get("forward"), "__globals__", {}).get("__name__") == "trl.trainer.utils"


def _name_of(function: Any) -> str:
    """Module and name. The repr of a bound method would print the whole module tree."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def refuse_router_loss(model: PreTrainedModel, asked: bool | None) -> None:
    configured = getattr(model.config.get_text_config(), "output_router_logits", False)
    if configured if asked is None else asked:
        raise unsupported(
            model,
            "adds an auxiliary router loss (output_router_logits=True), which the fused head would lose",
            expected="config.output_router_logits=False",
        )
