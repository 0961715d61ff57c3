"""The model that a run leaves: plain safetensors in output_dir/model, whatever the ranks hold of it.

A model that is whole on each rank is written by rank 0, and so are adapters. Of a sharded model each rank
that shares rank 0's disk writes some modules, about the same number of bytes. It gathers one tensor at a time
and keeps its own, so it holds its part and one whole tensor.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import transformers
from peft import PeftModel
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ...peft_heads import save_weights
from ..runs.checkpoint_storage import Ranks
from ..runs.distributed import World
from ..runs.files import new_folder, unfinished_name
from .adapters import record_base
from .sharding import adapters_to_save, is_sharded, part_to_save


def save_model(
    world: World,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> None:
    """Save the trained model, or its adapters, in folder/model, with the tokenizer. All ranks call it."""
    with shared_folder(world, folder / "model") as unfinished:
        write_model(world, model, tokenizer, unfinished)


@contextmanager
def shared_folder(world: World, path: Path) -> Iterator[Path]:
    """`new_folder` on rank 0; the other ranks get its temporary name."""
    with new_folder(path) if world.main else nullcontext(unfinished_name(path)) as unfinished:
        yield unfinished


def write_model(
    world: World,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> None:
    """Write a model, or its adapters, into a `shared_folder`, with the tokenizer. All ranks call it."""
    if isinstance(model, PreTrainedModel) and is_sharded(model):
        _write_parts(world, model, folder)
    else:
        state = adapters_to_save(model)
        if world.main:
            save_weights(model, folder, state_dict=state)
    if world.main:
        record_base(model, folder)
        tokenizer.save_pretrained(str(folder))


def _write_parts(world: World, model: PreTrainedModel, folder: Path) -> None:
    ranks = Ranks(world, folder.parent)  # after it, rank 0 has made the folder
    writers = [rank for rank, disk in enumerate(ranks.disks) if disk == ranks.disks[0]]
    part = part_to_save(model, writers, world.rank)
    local, size = folder / f"rank-{world.rank}", sum(tensor.nbytes for tensor in part.values())
    if part:
        # transformers lets rank 0 alone write.
        model.__dict__["should_save_on_this_rank"] = lambda is_main_process: True
        try:
            save_weights(model, local, state_dict=part)
        finally:
            del model.__dict__["should_save_on_this_rank"]
        if not any(local.glob("*.safetensors")):
            raise RuntimeError(
                f"model: got no file of rank {world.rank} (transformers {transformers.__version__}), "
                "expected this rank's share of the weights"
            )
    sizes = ranks.gather(size)  # after it, all files are there
    if world.main:
        _join(folder, [folder / f"rank-{rank}" for rank in writers], total_size=sum(sizes))


def _join(folder: Path, parts: Sequence[Path], *, total_size: int) -> None:
    """Make the folders of the writers one: numbered files with an index, and the configuration."""
    files = [path for part in parts for path in sorted(part.glob("*.safetensors"))]
    weight_map: dict[str, str] = {}
    for number, path in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else SAFE_WEIGHTS_NAME
        with safe_open(path, framework="pt") as opened:
            weight_map |= dict.fromkeys(opened.keys(), name)
        path.rename(folder / name)
    if len(files) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    for path in parts[0].glob("*.json"):
        if path.name != SAFE_WEIGHTS_INDEX_NAME:
            path.rename(folder / path.name)
    for part in parts:
        shutil.rmtree(part, ignore_errors=True)
