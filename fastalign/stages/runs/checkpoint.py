"""Checkpoints from which a run continues bitwise: trained weights, optimizer, random states, steps done.

They are torch.distributed.checkpoint's (checkpoint_storage.py has the files, checkpoint_tensors.py what is in
them): each rank writes its part, and a run may go on on another number of ranks, with FSDP2 or without.

A checkpoint is written to a temporary folder, synced to the disk and renamed. So a kill or a power loss
leaves no half checkpoint under a name step-…. The hashes show what a disk or a copy changes later: a run
resumes from the newest checkpoint whose files are as they were written. The position in the data is not
stored, because it is a function of the step and the seed (batches.py, `rows_of_step`). Learning rates are a
function of the step, and the optimizer's other options come from the configuration.
"""

import dataclasses
import json
import os
import re
import shutil
import warnings
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from ...data.readers import fingerprint_of
from ..config import TrainConfig
from ..token_cache import tokenizer_digest
from .checkpoint_storage import STATE, Planner, Ranks, Reader, Writer, find_damage, seal
from .checkpoint_tensors import (
    describe_layout,
    local_bytes,
    model_tensors,
    optimizer_tensors,
    random_tensors,
    set_random_states,
)
from .distributed import World
from .files import replace_folder, sync
from .run_folder import check_room, naming

# The position in the data is a function of these fields: with another value, the step means another place.
POSITION = ("train_data", "train_split", "seed", "batch_size")
# Fields about where and how a run continues may change freely.
WHERE = ("output_dir", "cache_dir", "resume", "report_to", "project", "timeout")
WHEN = ("save_every", "keep_checkpoints", "async_checkpoints")
SILENT = (*WHERE, *WHEN)


class Training(NamedTuple):
    """What a checkpoint saves and restores."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Weights and buffers, and the optimizer's state, by name."""
        model, optimizer = self
        return {"model": model_tensors(model), "optimizer": optimizer_tensors(model, optimizer)}


class Checkpoints:
    """The checkpoints of a run. Every rank makes one and calls the same methods in the same order.

    Leave it (`with`) at the end of the run: what is being written is then finished.
    """

    def __init__(self, config: TrainConfig, world: World, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.config, self.world, self.training = config, world, Training(model, optimizer)
        self.folder = Path(config.output_dir, "checkpoints")
        self.ranks: Ranks | None = None
        self.written: Future[None] | None = None
        self.thread = ThreadPoolExecutor(1, "fastalign-checkpoint") if config.async_checkpoints else None
        if world.size == 1:
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.finish()
        except Exception as failed:
            if error is None:
                raise
            self.world.say(f"the last checkpoint is not written: {failed}")
        finally:
            if self.thread is not None:
                self.thread.shutdown(wait=False)

    def save(self, *, step: int, **extra: Any) -> None:
        """Write the checkpoint after `step` steps, and delete the oldest.

        With async_checkpoints, copy the tensors to the host's memory and return: a thread writes them.
        Raises OSError if the disk has no room for it. Existing checkpoints stay.
        """
        self.finish()
        ranks = self._ranks()
        unfinished = self.folder / "unfinished"
        needed, what = self._bytes_on_disk(ranks), f"the checkpoint of step {step}"
        state = ranks.from_main(self._state(step, extra))
        if ranks.leads:
            shutil.rmtree(unfinished, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            check_room(self.folder, needed, what)
            unfinished.mkdir()
            (unfinished / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        ranks.barrier()
        tensors = self.training.tensors() | {f"random.{self.world.rank}": random_tensors(self.world)}
        writer = Writer(unfinished, ranks)
        options: dict[str, Any] = {
            "storage_writer": writer,
            "planner": Planner(ranks.disks),
            "process_group": ranks.group,
            "no_dist": ranks.group is None,
        }

        def publish(metadata: Metadata) -> None:
            with naming(self.folder, needed, what):
                writer.finish_on_disks(metadata)
                if ranks.leads:
                    seal(unfinished)
            if ranks.leads:
                replace_folder(unfinished, self.folder / f"step-{step:08d}")
                sync(self.folder.parent)
            ranks.barrier()  # no disk deletes its old checkpoint before all have the new one
            if ranks.leads:
                _delete_old(self.config)

        if self.thread is None:
            with naming(self.folder, needed, what), _first_failure():
                metadata = dcp.save(tensors, **options)
            publish(metadata)
            ranks.barrier()
            return
        writing: Any = dcp.async_save(tensors, **options)

        def finish_writing() -> None:
            with naming(self.folder, needed, what), _first_failure():
                metadata = writing.result()
            publish(metadata)

        self.written = self.thread.submit(finish_writing)

    def finish(self, *, wait: bool = True) -> None:
        """Raise what went wrong in a thread. wait: until the checkpoint is written; else only if it is."""
        if self.written is not None and (wait or self.written.done()):
            written, self.written = self.written, None
            written.result()

    def load_latest(self, **extra: Any) -> dict[str, Any] | None:
        """Restore the newest whole checkpoint; return its state, or None if the run has no checkpoint.

        Raises ValueError if a field on which the position in the data depends, one of `extra` (as given to
        `save`), or the content of train_data differs. Other fields that differ are printed. Call it last
        before the loop, because it sets the random states.
        """
        ranks = self._ranks()
        path = latest_whole(self.config.output_dir, self.world, ranks)
        if path is None:
            return None
        state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
        _compare(state, self.config, self.world, path, extra)
        tensors = self.training.tensors()
        reader = Reader(path, ranks)
        saved = reader.read_metadata().state_dict_metadata.keys()
        _check_names(path, tensors["model"], saved)
        states = tensors["optimizer"]
        # A weight that had no gradient when the checkpoint was written has no state.
        tensors["optimizer"] = {name: states[name] for name in states if f"optimizer.{name}" in saved}
        same_size = state["world_size"] == self.world.size
        random_states = random_tensors(self.world) if same_size else {}
        tensors[f"random.{self.world.rank}"] = random_states
        with _first_failure():
            dcp.load(tensors, storage_reader=reader, process_group=ranks.group, no_dist=ranks.group is None)
        for name, weight in self.training.model.named_parameters():
            if f"{name}.step" in states and f"{name}.step" not in tensors["optimizer"]:
                del self.training.optimizer.state[weight]
        layout = describe_layout(self.training.model, self.world)
        if same_size:
            set_random_states(random_states, self.world)
        if layout != state["layout"] and self.world.main:
            noise = "" if same_size else "; dropout draws other noise"
            warnings.warn(
                f"resuming on {layout} a run of {state['layout']}: the weights will be equal to rounding to "
                f"those of an uninterrupted run{noise}",
                stacklevel=2,
            )
        if ranks.leads:
            _delete_old(self.config)  # one that a kill left; a run that is at its last step saves no more
        self.world.say(f"resume: {path}")
        return state

    def _ranks(self) -> Ranks:
        if self.ranks is None:
            self.ranks = Ranks(self.world, self.folder)
        return self.ranks

    def _state(self, step: int, extra: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "step": step,
            "world_size": self.world.size,
            "layout": describe_layout(self.training.model, self.world),
            "threads": torch.get_num_threads(),
            "config": dataclasses.asdict(self.config),
            "data": fingerprint_of(self.config.train_data, split=self.config.train_split),
            "tokenizer": tokenizer_digest(),
            **extra,
        }

    def _bytes_on_disk(self, ranks: Ranks) -> int:
        """What the ranks of a disk hold together, but no more than the whole: replicas are written once."""
        whole = size(self.training.model)
        if len(set(ranks.disks)) == 1:
            return whole
        held = ranks.gather(_size(self.training.model, local_bytes))
        return min(whole, sum(held[rank] for rank in ranks.on_disk))


class _first_failure:  # noqa: N801 - a context manager
    """Raises the error of the lowest rank that failed, in place of torch's list of all with their traces."""

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, CheckpointException) and error.failures:
            raise error.failures[min(error.failures)][0] from None


def _delete_old(config: TrainConfig) -> None:
    unfinished = Path(config.output_dir, "checkpoints", "unfinished")
    for old in _all(config.output_dir)[: -config.keep_checkpoints]:
        # Renamed first: deleting takes many steps, and a kill between them must not leave half a folder.
        os.replace(old, unfinished)
        shutil.rmtree(unfinished)


def latest(output_dir: str) -> Path | None:
    """The newest checkpoint of a run; None if there is none."""
    return max(_all(output_dir), default=None)


def latest_whole(output_dir: str, world: World, ranks: Ranks | None = None) -> Path | None:
    """The newest checkpoint whose files are as they were written; None if a run has no checkpoint.

    Every rank calls it. Newer ones that are damaged are named, and renamed to ….damaged. Raises ValueError
    if all are damaged.
    """
    ranks = ranks or Ranks(world, Path(output_dir, "checkpoints"))
    if ranks.leads:
        # What a kill left of a checkpoint that was being written or deleted; a run that is at its last step
        # writes none over it.
        shutil.rmtree(Path(output_dir, "checkpoints", "unfinished"), ignore_errors=True)
    paths = {path.name: path for path in _all(output_dir)}
    on_all_disks = set.intersection(*map(set, ranks.gather([*paths])))
    whole, damaged = None, dict[Path, str]()
    for name in sorted(on_all_disks, reverse=True):
        damage = find_damage(paths[name], ranks)
        if damage is None:
            whole = paths[name]
            break
        damaged[paths[name]] = damage
    if damaged and whole is None:
        listed = "; ".join(f"{path.name}: {damage}" for path, damage in damaged.items())
        raise ValueError(
            f"resume: got no whole checkpoint in {output_dir!r} ({listed}), expected at least one: bring one "
            "back from a copy, or name another output_dir"
        )
    for path, damage in damaged.items():
        aside = path.with_name(path.name + ".damaged")
        if ranks.leads:
            replace_folder(path, aside)
        world.say(
            f"resume: {path} is damaged ({damage}), and now {aside.name}; what was trained after "
            f"{whole.name if whole else ''} is trained again"
        )
    return whole


def count(output_dir: str) -> int:
    """The number of checkpoints of a run."""
    return len(_all(output_dir))


def size(model: nn.Module) -> int:
    """Bytes of a checkpoint: what training changes, and AdamW's two moments of the weights."""
    return _size(model, lambda tensor: tensor.nbytes)


def _size(model: nn.Module, bytes_of: Any) -> int:
    tensors = model_tensors(model)
    trained = sum(bytes_of(tensor) for tensor in tensors.values() if tensor.requires_grad)
    return sum(map(bytes_of, tensors.values())) + 2 * trained


def _compare(
    state: Mapping[str, Any], config: TrainConfig, world: World, path: Path, extra: Mapping[str, Any]
) -> None:
    """Refuse a checkpoint that means another place in the data, and print what else differs."""
    now = json.loads(json.dumps(dataclasses.asdict(config)))  # as the checkpoint has it: lists for tuples
    before = state["config"]
    for name, old, new in [(n, before.get(n), now[n]) for n in now] + [
        (n, state[n], extra[n]) for n in extra
    ]:
        if old != new and (name in POSITION or name in extra):
            raise ValueError(
                f"resume: got {name}={new!r}, expected {old!r}, as when the run in {path} was started"
            )
        if old != new and name not in SILENT:
            world.say(f"resuming with {name}={new!r} (before: {old!r})")
    if state.get("tokenizer") not in (None, tokenizer_digest()):
        world.say(
            "resuming with another tokenizer or chat template than before: the same rows have other tokens"
        )
    _compare_threads(state["threads"], world)
    data = fingerprint_of(config.train_data, split=config.train_split)
    if state["data"] not in (None, data):
        raise ValueError(
            f"resume: got other rows in {config.train_data!r}, expected those with which the run in {path} "
            "was started: bring them back"
        )


def _check_names(path: Path, weights: Collection[str], saved: Iterable[str]) -> None:
    before = {name.removeprefix("model.") for name in saved if name.startswith("model.")}
    if differing := sorted({*weights} ^ before):
        raise ValueError(
            f"resume: got a model that differs from {path} in {', '.join(differing[:5])}, expected the same "
            "weights"
        )


def _compare_threads(before: int, world: World) -> None:
    """Print a line if the number of CPU threads differs, because PyTorch's sums are split among threads."""
    now = torch.get_num_threads()
    if world.device.type == "cpu" and before != now:
        world.say(
            f"resuming with {now} CPU threads (before: {before}): the weights will differ in their last "
            f"digits from those of an uninterrupted run; OMP_NUM_THREADS={before} keeps them the same"
        )


def _all(output_dir: str) -> list[Path]:
    """The checkpoints of a run, the oldest first, and nothing else that lies beside them."""
    found = Path(output_dir, "checkpoints").glob("step-*")
    return sorted(path for path in found if re.fullmatch(r"step-\d{8}", path.name) and path.is_dir())
