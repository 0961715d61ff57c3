"""PEFT's wrappers of an lm_head, as the fused head reads them: LoRA, and single tokens that are trained.

Both are a low-rank addition to a plain nn.Linear, which stays as it is (fastalign_kernels' low_rank.py):

    LoRA                      logits of W + s B A, with A reading dropout(X)
    trainable_token_indices   rows W[i] are replaced by D[i]: A = D - W[i], B has a 1 in row i

PEFT is not imported here: a wrapper exists only if it is loaded.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastalign_kernels.linear.low_rank import LowRank

from .probe import UnsupportedModelError


def save_weights(model: Any, folder: Path, *, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Save a transformers model, or the adapters of a PeftModel alone.

    PEFT itself would save the base's embeddings too if lm_head has an adapter. `state_dict` replaces that of
    the model, if its weights are shards.
    """
    peft_model: Any = _peft_class("peft_model", "PeftModel")
    adapters = peft_model is not None and isinstance(model, peft_model)
    options = {"save_embedding_layers": False} if adapters else {}
    model.save_pretrained(str(folder), state_dict=state_dict, **options)


class ReplacedRows(NamedTuple):
    """Rows of the head's weight that others replace."""

    indices: Sequence[int]
    rows: Tensor  # [k, H]

    def low_rank(self, weight: Tensor) -> LowRank:
        """What replacing them adds to the logits of `weight`, without a copy of it."""
        index = torch.tensor(self.indices, device=weight.device)
        B = torch.zeros(len(weight), len(self.indices), dtype=weight.dtype, device=weight.device)
        B[index, torch.arange(len(self.indices), device=weight.device)] = 1
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return LowRank(self.rows.to(weight.dtype).to(dtype) - weight[index].to(dtype), B, 1.0)


def _peft_class(module: str, name: str) -> type | None:
    return getattr(sys.modules.get(f"peft.{module}"), name, None)


def _is_a(module: nn.Module, of: str, name: str) -> bool:
    """Whether a module is PEFT's class, with its forward (a subclass may have another, as bitsandbytes')."""
    kind: Any = _peft_class(of, name)
    return kind is not None and isinstance(module, kind) and type(module).forward is kind.forward


def is_lora(module: nn.Module) -> bool:
    """Whether a module is PEFT's LoRA on an nn.Linear."""
    return _is_a(module, "tuners.lora.layer", "Linear")


def is_trainable_tokens(module: nn.Module) -> bool:
    """Whether a module is PEFT's wrapper that trains single rows of a weight."""
    return _is_a(module, "utils.other", "TrainableTokensWrapper")


def wrapped_head(head: Any) -> Any:
    """The module that a wrapper adds to, or None if it is no such wrapper."""
    if is_lora(head):
        return head.base_layer
    return head.token_adapter.base_layer if is_trainable_tokens(head) else None


def _active(head: Any) -> list[str]:
    """The adapters that act on the head's logits beside its weight."""
    layer = head if is_lora(head) else head.token_adapter
    known = head.lora_A if is_lora(head) else layer.trainable_tokens_delta
    if layer.disable_adapters or layer.merged:
        return []
    return [name for name in head.active_adapters if name in known]


def explain_adapters(head: Any) -> str | None:
    """Why the fused head cannot serve a wrapper's active adapters; None if it can."""
    active = _active(head)
    if len(active) > 1:
        return f"has {len(active)} active adapters on its lm_head ({', '.join(active)})"
    if not active:
        return None
    if is_trainable_tokens(head):
        biased = wrapped_head(head).bias is not None  # which PEFT's forward leaves out
        return "trains single tokens of an lm_head with a bias" if biased else None
    if variant := head.lora_variant.get(active[0]):
        kind = variant.__name__ if isinstance(variant, type) else type(variant).__name__
        return f"has {kind} (DoRA or another variant of LoRA) on its lm_head"
    return "has LoRA with a bias (lora_bias) on its lm_head" if head.lora_bias[active[0]] else None


def _restore(layer: Any) -> None:
    """Take an adapter that is merged and then disabled out of the weight, as PEFT's forward does."""
    if layer.disable_adapters and layer.merged:
        layer.unmerge()


def lora_of(head: Any, hidden: Tensor) -> LowRank | None:
    """The active adapter of a LoRA layer, with dropout as PEFT draws it; None if it is off or merged."""
    _restore(head)
    active = _active(head)
    if not active:
        return None
    (name,) = active
    A, B = head.lora_A[name].weight, head.lora_B[name].weight
    if isinstance(A, DTensor) or isinstance(B, DTensor):
        raise UnsupportedModelError(
            "lm_head.lora_A: got a DTensor inside lm_head's call, expected a whole weight"
        )
    dropout = head.lora_dropout[name]
    drops = isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0
    return LowRank(A, B, head.scaling[name], dropout(hidden.to(A.dtype)) if drops else None)


def replaced_rows_of(head: Any) -> ReplacedRows | None:
    """The rows that a wrapper of single tokens trains; None if it is off or merged."""
    layer = head.token_adapter
    _restore(layer)
    active = _active(head)
    if not active:
        return None
    (name,) = active
    return ReplacedRows(layer.token_indices[name], layer.trainable_tokens_delta[name])


def adapter_forward(module: nn.Module) -> Callable[..., Any] | None:
    """The forward that takes targets, of a wrapper; None if the module is none."""
    if is_lora(module):
        return _fastalign_lora_forward
    return _fastalign_tokens_forward if is_trainable_tokens(module) else None


def _fastalign_lora_forward(
    self: Any, hidden: Tensor, targets: Tensor | None = None, *arguments: Any, **options: Any
) -> Any:
    """The forward of PEFT's LoRA on lm_head: with targets, the head gets the adapter beside its weight."""
    if targets is None:
        return type(self).forward(self, hidden, **options)
    _refuse_names(options)
    return self.base_layer(hidden, targets, *arguments, lora=lora_of(self, hidden), **options)


def _fastalign_tokens_forward(
    self: Any, hidden: Tensor, targets: Tensor | None = None, *arguments: Any, **options: Any
) -> Any:
    """The forward of PEFT's wrapper that trains single rows of lm_head, in the same way."""
    if targets is None:
        return type(self).forward(self, hidden, **options)
    _refuse_names(options)
    return wrapped_head(self)(hidden, targets, *arguments, replaced_rows=replaced_rows_of(self), **options)


def _refuse_names(options: Mapping[str, Any]) -> None:
    if options.get("adapter_names") is not None:
        raise UnsupportedModelError(
            f"adapter_names: got {options['adapter_names']} with labels, expected None: lm_head has one "
            "adapter for all rows"
        )
