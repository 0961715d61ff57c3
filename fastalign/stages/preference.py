"""What the preference stages share: their fields, how they pack, and the reference that a policy is compared with.

The reference is the model as it is before training. Its log-probabilities come from a frozen copy, from the model
with its adapters switched off, or from a table made before the first step; the values are the same.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from peft import PeftModel
from pydantic import Field, PositiveFloat, model_validator
from pydantic.dataclasses import dataclass
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..causal_lm import backbone
from ..data import Tokenized
from ..preferences import Batch, pack_sequences, sequence_logps
from ..shared_prompts import explain_unshared
from .config import CONFIG, TrainConfig
from .estimate import Part
from .loop import autocast
from .world import World

Reference = Callable[[Batch], Tensor]  # packed sequences, on the device -> their log-probabilities [S], without gradient


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class PreferenceConfig(TrainConfig):
    """What every preference stage has."""

    model: str
    """Folder or name of the model."""
    max_length: int = Field(default=1024, ge=2)
    """Longest prompt with its completion in tokens."""
    too_long: Literal["refuse", "drop", "truncate"] = "drop"
    """What to do with a row that is longer: refuse it, leave it out or cut it at the right; the log counts the rows."""
    packing: bool = True
    """Pack sequences that share a forward pass into rows as long as the longest, blind to each other, and compute the
    prompt that two of them share once, where the attention takes a mask and it pays."""


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class ReferenceConfig(PreferenceConfig):
    """What the stages that compare a policy with a reference have."""

    learning_rate: PositiveFloat = 1e-6
    """Peak learning rate of AdamW."""
    beta: PositiveFloat = 0.1
    """Strength of the pull to the reference: rewards are beta times the log-ratio of policy and reference."""
    reference: Literal["auto", "copy", "adapters_off", "precomputed"] = "auto"
    """Where the log-probabilities of the model before training come from: a frozen copy of it, the model without its
    LoRA adapters, or one pass before the first step, kept in a file. auto: adapters_off with LoRA, else copy."""
    reference_dir: str | None = None
    """Folder of the precomputed log-probabilities; runs that share it score a sequence once. Default: output_dir."""

    @model_validator(mode="after")
    def _check_reference(self) -> Self:
        if self.reference == "adapters_off" and not self.lora_rank:
            raise ValueError("reference: adapters_off needs adapters (lora_rank > 0); allowed without: auto, copy, precomputed")
        if self.reference_dir is not None and self.reference != "precomputed":
            raise ValueError(f"reference_dir ({self.reference_dir!r}) needs reference=precomputed, not {self.reference}")
        return self


def without_dropout(model: nn.Module) -> None:
    """Switch a model's own dropout off, not its adapters': a policy is compared with a reference token by token."""
    for name, module in model.named_modules():
        if "lora_" in name:
            continue
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for attribute, value in vars(module).items():
            if "dropout" in attribute and isinstance(value, float):
                setattr(module, attribute, 0.0)


def make_packer(
    config: PreferenceConfig, world: World, model: PreTrainedModel | PeftModel, *, attention: str, pad_id: int, longest: int
) -> Callable[..., Batch]:
    """`pack_sequences` as configured, with shared prompts where the model takes them; where it does not, that is said.

    `longest` is the number of tokens of the longest sequence.
    """
    packer = partial(pack_sequences, pad_id=pad_id, attention=attention, packing=config.packing)
    if not config.packing:
        return packer
    if why := explain_unshared(backbone(model), packer, attention=attention, longest=longest):
        world.say(f"packing: each sequence has its own copy of the prompt ({why})")
        return packer
    return partial(packer, hidden_size=model.config.get_text_config().hidden_size)


def pack_rows(rows: Sequence[Sequence[Tokenized]], **options: Any) -> Mapping[str, Any]:
    """A model's arguments for all sequences of the rows, without shared prompts; `options` are `pack_sequences`'."""
    arguments: Mapping[str, Any] = pack_sequences([sequence for row in rows for sequence in row], **options)["arguments"]
    return arguments


def parts_of(config: ReferenceConfig, architecture: PretrainedConfig) -> list[Part]:
    """The models that a step needs: the one that is trained, and where the reference is a copy, that."""
    copied = config.reference == "copy" or (config.reference == "auto" and not config.lora_rank)
    reference = [Part("reference", architecture, trained=False)] if copied else []
    return [Part("model", architecture), *reference]


def make_reference(config: ReferenceConfig, world: World, model: PreTrainedModel | PeftModel, scored: Iterable[Batch]) -> Reference:
    """The reference of `model`, which is not trained yet; `scored` are all packed sequences that this rank will ask it for."""
    if config.reference == "precomputed":
        return _precompute(config, world, model, scored)
    if isinstance(model, PeftModel) and config.reference != "copy":
        return lambda packed: _adapters_off(model, packed)
    frozen = copy.deepcopy(model).requires_grad_(False).eval()
    return lambda packed: _score(frozen, packed)


def _score(model: nn.Module, packed: Batch) -> Tensor:
    with torch.no_grad():
        return sequence_logps(model, packed)


def _adapters_off(model: PeftModel, packed: Batch) -> Tensor:
    with model.disable_adapter():
        return _score(model, packed)


def _precompute(config: ReferenceConfig, world: World, model: PreTrainedModel | PeftModel, scored: Iterable[Batch]) -> Reference:
    """A table from sequences to log-probabilities, read from a file named after the model, and completed there.

    A sequence is scored in the batch that meets it first, so its value is bitwise the one that the other ways compute
    there. In other company (a later epoch) theirs may differ from it by rounding.
    """
    folder = Path(config.reference_dir or config.output_dir)
    path = folder / f"reference-{_digest_model(config, model).hex()}.safetensors"
    table: dict[bytes, float] = {}
    if path.exists():
        stored = load_file(path)
        table = dict(zip((bytes(key) for key in stored["sequences"].numpy()), stored["logps"].tolist(), strict=True))
    known = len(table)
    score = _adapters_off if isinstance(model, PeftModel) else _score
    with autocast(config, world):
        for packed in scored:
            keys = [_digest(sequence) for sequence in packed["sequences"]]
            if any(key not in table for key in keys):
                for key, value in zip(keys, score(model, world.place(packed)).tolist(), strict=True):
                    table.setdefault(key, value)
    if world.size > 1:
        tables: list[Any] = [None] * world.size
        dist.all_gather_object(tables, table)
        table = {key: value for part in reversed(tables) for key, value in part.items()}  # the first rank's value wins
    if world.main and len(table) > known:
        folder.mkdir(parents=True, exist_ok=True)
        keys_of = torch.frombuffer(bytearray(b"".join(table)), dtype=torch.uint8).view(len(table), -1)
        unfinished = path.with_suffix(".unfinished")
        save_file({"sequences": keys_of, "logps": torch.tensor(list(table.values()), dtype=torch.float64)}, unfinished)
        unfinished.rename(path)
    world.say(f"reference: {len(table)} sequences, {known} of them known, in {path}")
    dtype = torch.float64 if config.dtype == "float64" else torch.float32

    def look_up(packed: Batch) -> Tensor:
        values = [table[_digest(sequence)] for sequence in packed["sequences"]]
        return torch.tensor(values, dtype=dtype, device=packed["starts"].device)

    return look_up


def _digest(sequence: Tokenized) -> bytes:
    return hashlib.blake2b(repr(tuple(sequence)).encode(), digest_size=16).digest()


def _digest_model(config: ReferenceConfig, model: PreTrainedModel | PeftModel) -> bytes:
    """Of the weights but the adapters, the architecture, and what else the values depend on beyond rounding."""
    fields = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
    fields |= {"bf16": config.bf16, "attention": model.config._attn_implementation}
    digest = hashlib.blake2b(json.dumps(fields, sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensor in model.state_dict().items():
        if "lora_" not in name:
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.digest()
