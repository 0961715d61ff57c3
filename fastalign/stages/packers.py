"""How the stages that compare sequences pack them into a forward pass."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..data.packing import collate
from ..data.sequence_batches import Batch, pack_sequences
from ..data.shared_prefix import explain_unshared
from ..data.tokens import Tokenized
from ..servable_heads import backbone
from .runs.distributed import World
from .stage_configs import PreferenceConfig


def without_dropout(model: nn.Module) -> None:
    """Switch off a model's dropout, but not its adapters'.

    A policy is compared with a reference token by token.
    """
    for name, module in model.named_modules():
        if "lora_" in name:
            continue
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for attribute, value in vars(module).items():
            if "dropout" in attribute and isinstance(value, float):
                setattr(module, attribute, 0.0)


def make_packer(
    config: PreferenceConfig,
    world: World,
    model: PreTrainedModel | PeftModel,
    *,
    attention: str,
    pad_id: int,
    longest: int,
) -> Callable[..., Batch]:
    """`pack_sequences` as configured, with shared prompts if the model takes them; if not, it says why.

    `longest` is the number of tokens of the longest sequence.
    """
    packer = partial(pack_sequences, pad_id=pad_id, attention=attention, packing=config.packing)
    if not config.packing:
        return packer
    explain = partial(explain_unshared, backbone(model), packer, attention=attention, longest=longest)
    if why := world.on_main(explain):
        world.say(f"packing: each sequence has its own copy of the prompt ({why})")
        return packer
    return partial(packer, hidden_size=model.config.get_text_config().hidden_size)


def collate_rows(rows: Sequence[Sequence[Tokenized]], *, pad_id: int, **options: Any) -> Mapping[str, Any]:
    """`fastalign.data.collate`'s arguments; for no rows, those of a padding token that is not trained."""
    return collate(rows or [[Tokenized([pad_id], [False])]], pad_id=pad_id, **options)


def pack_rows(rows: Sequence[Sequence[Tokenized]], **options: Any) -> Mapping[str, Any]:
    """A model's arguments for all sequences of the rows, without shared prompts.

    `options` are those of `pack_sequences`.
    """
    arguments: Mapping[str, Any] = pack_sequences([sequence for row in rows for sequence in row], **options)[
        "arguments"
    ]
    return arguments
