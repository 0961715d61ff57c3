"""What a rollout refuses before it begins.

These are models without a static cache of keys and values, and prompts that do not fit.
"""

import inspect
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastalign_kernels import checks as check

from ..probe import unsupported
from ..rope import rope_switch
from ..servable_heads import transformers_model
from ..transformers_names import CACHE


def servable_model(model: Any) -> Any:
    """The transformers model in `model`. Raises UnsupportedModelError if it cannot generate here."""
    base: Any = transformers_model(model, remedy="pass the model inside of DDP or torch.compile")
    if not base.can_generate():
        raise unsupported(base, "has no language-model head", expected="a causal LM")
    accepted = inspect.signature(base.forward).parameters
    missing = [name for name in ("input_ids", "attention_mask", CACHE) if name not in accepted]
    if missing or base._is_stateful or not base._supports_default_dynamic_cache():
        raise unsupported(base, "keeps another state", expected="a cache of keys and values alone")
    if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
        raise unsupported(
            base, "has PEFT's virtual tokens (prompt learning) before the prompt", expected="none"
        )
    attention = base.config.get_text_config(decoder=True)._attn_implementation
    if attention not in ("eager", "sdpa"):
        raise unsupported(
            base,
            f"has attention {attention!r}, which reads no static cache",
            expected="eager or sdpa (model.set_attn_implementation)",
        )
    if any(isinstance(weight, DTensor) for weight in base.parameters()):
        raise unsupported(
            base,
            "is sharded over ranks (DTensor)",
            expected="a whole model on each rank, because rows end at different steps",
        )
    return base


def _is_id(number: object, vocab_size: int) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool) and 0 <= int(number) < vocab_size


def check_bits(input_ids: Tensor, **bits: object) -> None:
    """Raise ValueError for bit masks of ids that are no int32 rows beside the prompts, or None.

    How many words a row has is known when the model has given logits.
    """
    for name, value in bits.items():
        if value is None:
            continue
        check.tensor(name, value)
        assert isinstance(value, Tensor)
        check.dtype(name, value, (torch.int32,))
        if value.dim() != 2 or len(value) != len(input_ids):
            raise ValueError(
                f"{name}: got shape {list(value.shape)}, expected [B, ceil(V / 32)] with B = {len(input_ids)}"
            )
        check.device(name, value, "input_ids", input_ids)


def check_prompts(
    base: Any, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, special: dict[str, list[int]]
) -> None:
    """Raise ValueError for prompts, max_new_tokens or `special` ids that do not fit the model.

    `special` maps an argument's name to its ids.
    """
    check.tensors(input_ids=input_ids, attention_mask=attention_mask)
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(
            f"input_ids: got shape {list(input_ids.shape)}, expected [B, T] with at least one row and token"
        )
    check.dtype("input_ids", input_ids, check.INTEGERS)
    check.shape("attention_mask", attention_mask, tuple(input_ids.shape), "[B, T]")
    check.dtype("attention_mask", attention_mask, (*check.INTEGERS, torch.bool))
    check.device("attention_mask", attention_mask, "input_ids", input_ids)
    for device in {weight.device for weight in base.parameters()} - {input_ids.device}:
        raise ValueError(
            f"input_ids: got a tensor on {input_ids.device}, expected {device}, where the model has weights"
        )
    V = base.get_input_embeddings().weight.shape[0]
    for name, ids in (special | {"input_ids": [int(end) for end in input_ids.aminmax()]}).items():
        if not all(_is_id(number, V) for number in ids):
            raise ValueError(f"{name}: got {ids}, expected ids in [0, {V})")
    check.whole("max_new_tokens", max_new_tokens, 1, expected="a whole number from 1 on")
    mask = attention_mask.long()
    ragged = (mask[:, :1] < 0) | (mask[:, -1:] != 1) | (mask.diff(dim=1) < 0)
    rows = ragged.any(1).nonzero()[:, 0].tolist()
    if rows:
        raise ValueError(
            f"attention_mask: got {len(rows)} rows, {rows[:8]} first, that do not go from 0 (padding) to 1 "
            "(tokens) and end in 1, expected prompts of at least one token, padded on the left"
        )
    shortest, longest = (int(end) for end in mask.sum(1).aminmax())
    switch = rope_switch(base.config)
    if switch is not None and switch.crossed_by(shortest, longest + max_new_tokens):
        raise ValueError(
            f"max_new_tokens: got {max_new_tokens} after prompts of {shortest} to {longest} tokens, "
            f"expected a rollout on one side of {switch}, because a cache would keep keys of both"
        )
    most = getattr(base.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if most is not None and longest + max_new_tokens > most:
        raise ValueError(
            f"max_new_tokens: got {max_new_tokens} after a prompt of {longest} tokens, "
            f"expected at most {most} positions together (config.max_position_embeddings)"
        )
