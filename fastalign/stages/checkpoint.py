"""Checkpoints from which a run continues bitwise: trained weights, optimizer, random states, steps done.

A folder checkpoints/step-00000200 holds

    state.pt: trained weights, buffers, optimizer, step and configuration.
    random-0.pt: random states of rank 0, and one such file for each further rank.
    manifest.sha256: hashes of these files, which `sha256sum --check` reads.

A checkpoint is written to a temporary folder, synced to the disk and renamed. So a kill or a power loss
leaves no half checkpoint under a name step-…. The hashes show what a disk or a copy changes later: a run
resumes from the newest checkpoint whose files are as they were written. The position in the data is not
stored, because it is a function of the step and the seed (batches.py, `rows_of_step`). Learning rates are a
function of the step.
"""

import dataclasses
import os
import random
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..data.readers import fingerprint_of
from .config import TrainConfig
from .distributed import World
from .files import find_damage, replace_folder, seal, sync
from .run_folder import check_room, naming

# The position in the data is a function of these fields: with another value, the step means another place.
POSITION = ("train_data", "train_split", "seed", "batch_size")
# Fields about where and how a run continues may change freely.
SILENT = ("output_dir", "resume", "report_to", "project", "save_every", "keep_checkpoints", "timeout")


def save(
    config: TrainConfig,
    world: World,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    step: int,
    **extra: Any,
) -> None:
    """Write the checkpoint after `step` steps, and delete the oldest. Every rank calls it.

    Raises OSError if the disk has no room for it. Existing checkpoints stay.
    """
    folder = Path(config.output_dir, "checkpoints")
    unfinished = folder / "unfinished"
    needed, what = size(model), f"the checkpoint of step {step}"
    if world.main:
        shutil.rmtree(unfinished, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        check_room(folder, needed, what)
        unfinished.mkdir()
    world.barrier()
    random_path = unfinished / f"random-{world.rank}.pt"
    torch.save(_random_states(world), random_path)
    sync(random_path)  # here: another machine's sync would not wait for it
    if world.main:
        data = fingerprint_of(config.train_data, split=config.train_split)
        state = {
            "step": step,
            "world_size": world.size,
            "threads": torch.get_num_threads(),
            "config": dataclasses.asdict(config),
            "data": data,
            **extra,
        }
        state |= {"tensors": _tensors(model), "optimizer": optimizer.state_dict()}
        with naming(folder, needed, what):
            torch.save(state, unfinished / "state.pt")
    world.barrier()
    if world.main:
        with naming(folder, needed, what):
            seal(unfinished)
        replace_folder(unfinished, folder / f"step-{step:08d}")
        sync(folder.parent)
        _delete_old(config)
    world.barrier()


def _delete_old(config: TrainConfig) -> None:
    unfinished = Path(config.output_dir, "checkpoints", "unfinished")
    for old in _all(config.output_dir)[: -config.keep_checkpoints]:
        # Renamed first: deleting takes many steps, and a kill between them must not leave half a folder.
        os.replace(old, unfinished)
        shutil.rmtree(unfinished)


def latest(output_dir: str) -> Path | None:
    """The newest checkpoint of a run; None if there is none."""
    return max(_all(output_dir), default=None)


def latest_whole(output_dir: str, world: World) -> Path | None:
    """The newest checkpoint whose files are as they were written; None if a run has no checkpoint.

    Every rank calls it. Newer ones that are damaged are named, and renamed to ….damaged. Raises ValueError
    if all are damaged.
    """
    found: list[Any] = [None, {}]
    if world.main:
        # What a kill left of a checkpoint that was being written or deleted; a run that is at its last step
        # writes none over it.
        shutil.rmtree(Path(output_dir, "checkpoints", "unfinished"), ignore_errors=True)
        for path in reversed(_all(output_dir)):
            damage = find_damage(path)
            if damage is None:
                found[0] = path
                break
            found[1][path] = damage
    if world.size > 1:
        dist.broadcast_object_list(found)
    whole, damaged = found
    if damaged and whole is None:
        listed = "; ".join(f"{path.name}: {damage}" for path, damage in damaged.items())
        raise ValueError(
            f"resume: got no whole checkpoint in {output_dir!r} ({listed}), expected at least one: bring one "
            "back from a copy, or name another output_dir"
        )
    for path, damage in damaged.items() if world.main else ():
        aside = path.with_name(path.name + ".damaged")
        replace_folder(path, aside)
        world.say(
            f"resume: {path} is damaged ({damage}), and now {aside.name}; what was trained after "
            f"{whole.name} is trained again"
        )
    return whole


def count(output_dir: str) -> int:
    """The number of checkpoints of a run."""
    return len(_all(output_dir))


def size(model: nn.Module) -> int:
    """Bytes of a checkpoint: what training changes, and AdamW's two moments of the weights."""
    tensors = _tensors(model)
    trained = sum(tensor.nbytes for tensor in tensors.values() if tensor.requires_grad)
    return sum(tensor.nbytes for tensor in tensors.values()) + 2 * trained


def load(
    path: Path,
    config: TrainConfig,
    world: World,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    **extra: Any,
) -> dict[str, Any]:
    """Restore model, optimizer and random states; return the state's other entries.

    Raises ValueError if a field on which the position in the data depends, one of `extra` (as given to
    `save`), or the content of train_data differs. Other fields that differ are printed. Call it last before
    the loop, because it sets the random states.
    """
    state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    before, now = state["config"], dataclasses.asdict(config)
    for name, old, new in [(n, before.get(n), now[n]) for n in now] + [
        (n, state[n], extra[n]) for n in extra
    ]:
        if old != new and (name in POSITION or name in extra):
            raise ValueError(
                f"resume: got {name}={new!r}, expected {old!r}, as when the run in {path} was started"
            )
        if old != new and name not in SILENT:
            world.say(f"resuming with {name}={new!r} (before: {old!r})")
    _compare_threads(state.get("threads"), world)
    data = fingerprint_of(config.train_data, split=config.train_split)
    if state.get("data") not in (None, data):
        raise ValueError(
            f"resume: got other rows in {config.train_data!r}, expected those with which the run in {path} "
            "was started: bring them back"
        )
    tensors = _tensors(model)
    if tensors.keys() != state["tensors"].keys():
        differing = sorted(tensors.keys() ^ state["tensors"].keys())
        raise ValueError(
            f"resume: got a model that differs from {path} in {', '.join(differing[:5])}, expected the same "
            "weights"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(state["tensors"][name])
    optimizer.load_state_dict(state["optimizer"])
    if state["world_size"] == world.size:
        _set_random_states(torch.load(path / f"random-{world.rank}.pt", weights_only=True), world)
    elif world.main:
        warnings.warn(
            f"resuming on {world.size} processes a run of {state['world_size']}: dropout draws other noise",
            stacklevel=2,
        )
    if world.main:
        _delete_old(config)  # one that a kill left; a run that is at its last step saves no more
    return {name: value for name, value in state.items() if name not in ("tensors", "optimizer", "config")}


def _compare_threads(before: int | None, world: World) -> None:
    """Print a line if the number of CPU threads differs, because PyTorch's sums are split among threads.

    A checkpoint of an earlier version has no number.
    """
    now = torch.get_num_threads()
    if world.device.type == "cpu" and before not in (None, now):
        world.say(
            f"resuming with {now} CPU threads (before: {before}): the weights will differ in their last "
            "digits from "
            f"those of an uninterrupted run; OMP_NUM_THREADS={before} keeps them the same"
        )


def _all(output_dir: str) -> list[Path]:
    """The checkpoints of a run, the oldest first, and nothing else that lies beside them."""
    found = Path(output_dir, "checkpoints").glob("step-*")
    return sorted(path for path in found if re.fullmatch(r"step-\d{8}", path.name) and path.is_dir())


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    # What training changes: frozen weights (LoRA's base) come from where they came from the first time.
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()}
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad} | buffers


def _random_states(world: World) -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state(world.device) if world.device.type == "cuda" else None
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": cuda}


def _set_random_states(states: dict[str, Any], world: World) -> None:
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(states["torch"])
    if world.device.type == "cuda" and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"], world.device)
