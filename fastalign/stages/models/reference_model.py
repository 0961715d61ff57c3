"""The reference of DPO and KTO: the model before training, which gives log-probabilities to compare with.

They come from a frozen copy, from the model with its adapters switched off, or from a table computed before
the first step. The values are the same.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ...data.sequence_batches import Batch, sequence_logps
from ...data.tokens import Tokenized
from ..estimate import Part
from ..optimization import autocast
from ..runs.distributed import World
from ..runs.files import new_file
from ..runs.run_folder import held
from ..stage_configs import ReferenceConfig
from .sharding import reshard, shard

# Packed sequences, on the device -> their log-probabilities [S], without gradient
Reference = Callable[[Batch], Tensor]


def parts_of(config: ReferenceConfig, architecture: PretrainedConfig) -> list[Part]:
    """The models that a step needs: the trained one, and the reference if it is a copy."""
    copied = config.reference == "copy" or (config.reference == "auto" and not config.lora_rank)
    reference = [Part("reference", architecture, trained=False)] if copied else []
    return [Part("model", architecture), *reference]


def make_reference(
    config: ReferenceConfig, world: World, model: PreTrainedModel | PeftModel, scored: Iterable[Batch]
) -> Reference:
    """The reference of `model`, which is not trained yet.

    `scored` are all packed sequences that this rank will ask for. The model is still whole; a precomputed
    reference shards it, and a copy is sharded.
    """
    if config.reference == "precomputed":
        return _precompute(config, world, model, scored)
    if isinstance(model, PeftModel) and config.reference != "copy":
        return lambda packed: _adapters_off(model, packed)
    frozen = shard(world.sharding, copy.deepcopy(model).requires_grad_(False).eval())
    return lambda packed: _score(frozen, packed)


def _score(model: nn.Module, packed: Batch) -> Tensor:
    with torch.no_grad():
        logps = sequence_logps(model, packed)
    # PEFT switches adapters by requires_grad of the weights it finds, which must be the optimizer's.
    reshard(model)
    return logps


def _adapters_off(model: PeftModel, packed: Batch) -> Tensor:
    with model.disable_adapter():
        return _score(model, packed)


def _precompute(
    config: ReferenceConfig, world: World, model: PreTrainedModel | PeftModel, scored: Iterable[Batch]
) -> Reference:
    """A table from sequences to log-probabilities, read from the model's file and completed there.

    A sequence is scored in the first batch that contains it, so its value is bitwise the one that a copy
    would compute there. In another batch (a later epoch) a copy's value may differ from it by rounding.
    """
    folder = Path(config.reference_dir or config.output_dir)
    digest = world.on_main(partial(_digest_model, config, model))
    path = folder / f"reference-{digest.hex()}.safetensors"
    table = _read_table(path)
    known = len(table)
    shard(world.sharding, model)
    score = _adapters_off if isinstance(model, PeftModel) else _score
    with autocast(config, world):
        for packed in scored:
            keys = [_digest(sequence) for sequence in packed["sequences"]]
            missing = int(any(key not in table for key in keys))
            # Ranks of a sharded model run it together.
            if missing if world.sharding is None else world.max(missing):
                for key, value in zip(keys, score(model, world.place(packed)).tolist(), strict=True):
                    table.setdefault(key, value)
    if world.size > 1:
        tables: list[Any] = [None] * world.size
        dist.all_gather_object(tables, table)
        # The first rank's value wins
        table = {key: value for part in reversed(tables) for key, value in part.items()}
    if world.main and len(table) > known:
        # Another run that shares the folder may have written first. Its values stay, so that both runs
        # continue, and resume, with the same ones.
        with held("reference_dir", folder, name=path.stem + ".lock", wait=True):
            table |= _read_table(path)
            _write_table(path, table)
    if world.size > 1:
        shared = [table]
        dist.broadcast_object_list(shared)
        table = shared[0]
    world.say(f"reference: {len(table)} sequences, {known} of them known, in {path}")
    dtype = torch.float64 if config.dtype == "float64" else torch.float32

    def look_up(packed: Batch) -> Tensor:
        values = [table[_digest(sequence)] for sequence in packed["sequences"]]
        return torch.tensor(values, dtype=dtype, device=packed["starts"].device)

    return look_up


def _write_table(path: Path, table: dict[bytes, float]) -> None:
    keys_of = torch.frombuffer(bytearray(b"".join(table)), dtype=torch.uint8).view(len(table), -1)
    tensors = {"sequences": keys_of, "logps": torch.tensor(list(table.values()), dtype=torch.float64)}
    with new_file(path) as unfinished:
        save_file(tensors, unfinished, metadata={"blake2b": _digest_tensors(tensors)})


def _read_table(path: Path) -> dict[bytes, float]:
    """The table in a file; empty if there is no file. Raises ValueError if the file is damaged."""
    if not path.exists():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            stored, written = (
                {name: file.get_tensor(name) for name in ("sequences", "logps")},
                (file.metadata() or {}).get("blake2b"),
            )
    except SafetensorError as error:
        raise ValueError(
            f"reference: got a damaged file {path} ({error}), expected a whole one: delete it, and its "
            "values are recomputed"
        ) from error
    if written != _digest_tensors(stored):
        raise ValueError(
            f"reference: got a damaged file {path}, whose hash is not that of its values, expected a whole "
            "one: delete it, and its values are recomputed"
        )
    return dict(
        zip((bytes(key) for key in stored["sequences"].numpy()), stored["logps"].tolist(), strict=True)
    )


def _digest_tensors(tensors: dict[str, Tensor]) -> str:
    return hashlib.blake2b(
        b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors.values()), digest_size=16
    ).hexdigest()


def _digest(sequence: Tokenized) -> bytes:
    return hashlib.blake2b(repr(tuple(sequence)).encode(), digest_size=16).digest()


def _digest_model(config: ReferenceConfig, model: PreTrainedModel | PeftModel) -> bytes:
    """A hash of all that changes values beyond rounding: weights, architecture, precision.

    Adapters do not count.
    """
    fields = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
    fields |= {"bf16": config.bf16, "attention": model.config._attn_implementation}
    fields |= {"screen": True} if config.screen else {}
    digest = hashlib.blake2b(json.dumps(fields, sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensor in model.state_dict().items():
        if "lora_" not in name:
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.digest()
