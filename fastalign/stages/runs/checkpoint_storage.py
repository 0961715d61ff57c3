"""The files of a checkpoint: who writes them, on which disk, and how one sees that they are whole.

A folder step-00000200 holds

    __R_0.distcp: what rank R wrote, by torch.distributed.checkpoint. Each rank writes about as much.
    .metadata: which tensor lies where in these files.
    state.json: step, layout, configuration.
    rank-R.sha256: the hashes of rank R's files, computed by rank R.
    manifest.sha256: the hashes of the rest. `sha256sum --check manifest.sha256 rank-*.sha256` reads both.

Nodes may share a disk or have their own. On each disk its lowest rank, the leader, makes the folder, seals
and renames it. A tensor that several ranks hold whole is written once on each disk, so a run that goes on
with the same layout on the same nodes finds all it needs. On other nodes or another layout, copy the files
of all disks into one folder first: their names differ, but for manifest.sha256, state.json and .metadata, of
which any will do.
"""

import os
import pickle
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint._dedup_save_plans import dedup_save_plans
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from .distributed import World
from .files import MANIFEST, find_change, list_hashes, sync, write_hashes

STATE = "state.json"
METADATA = ".metadata"
Value = TypeVar("Value")


class Ranks:
    """The ranks that write a checkpoint, in a process group of their own, and which of them share a disk.

    The group is gloo's: checkpoints travel between CPUs, and in a thread beside the training's collectives.
    """

    def __init__(self, world: World, folder: Path) -> None:
        """folder: where the ranks will write. All ranks call it."""
        self.world = world
        self.group = None
        self.disks = [0]  # for each rank: the leader of its disk
        if world.size > 1:
            limit = None if world.watch is None else timedelta(seconds=world.watch.seconds + 30)
            self.group = dist.new_group(backend="gloo", timeout=limit)
            self.disks = self._find_disks(folder)

    @property
    def leads(self) -> bool:
        """Whether this rank makes and renames the folder on its disk."""
        return self.disks[self.world.rank] == self.world.rank

    @property
    def on_disk(self) -> list[int]:
        """The ranks that share this rank's disk."""
        return [rank for rank, leader in enumerate(self.disks) if leader == self.disks[self.world.rank]]

    def gather(self, value: Value) -> list[Value]:
        """The values of all ranks."""
        values = [value]
        if self.group is not None:
            values *= self.world.size
            dist.all_gather_object(values, value, group=self.group)
        return values

    def from_main(self, value: Value) -> Value:
        """Rank 0's value."""
        values = [value]
        if self.group is not None:
            dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.group is not None:
            dist.barrier(group=self.group)

    def _find_disks(self, folder: Path) -> list[int]:
        """A file of each node's first rank shows which nodes see each other's files."""
        first = int(os.environ.get("LOCAL_RANK", "0")) == 0
        name = self.from_main(f".disk-{os.urandom(6).hex()}-")
        mine = folder / f"{name}{self.world.rank}"
        if first:
            folder.mkdir(parents=True, exist_ok=True)
            mine.touch()
        nodes = [rank for rank, of_node in enumerate(self.gather(first)) if of_node]
        seen = next(rank for rank in nodes if (folder / f"{name}{rank}").exists()) if first else None
        leaders = self.gather(seen)
        if first:
            mine.unlink()
        disks: list[int] = []
        for leader in leaders:  # the ranks of a node follow its first one
            disks.append(disks[-1] if leader is None else leader)
        return disks


class Planner(DefaultSavePlanner):
    """Writes a tensor that several ranks hold once on each disk, by the rank that has least to write."""

    def __init__(self, disks: Sequence[int]) -> None:
        super().__init__()
        self.disks = disks

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = super().create_global_plan(all_plans)
        if len(set(self.disks)) == 1:
            return plans, metadata
        for leader in set(self.disks):
            ranks = [rank for rank, disk in enumerate(self.disks) if disk == leader]
            local = dedup_save_plans([all_plans[rank] for rank in ranks])
            for rank, plan in zip(ranks, local, strict=True):
                plans[rank] = plan
        return plans, metadata


class Writer(FileSystemWriter):
    """Writes this rank's file and its hash; on a leader also .metadata."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        super().__init__(folder)
        self.folder, self.ranks = folder, ranks
        self.results: list[list[WriteResult]] = []

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        written = super().write_data(plan, planner)
        rank = self.ranks.world.rank
        write_hashes(self.folder, self.folder / f"rank-{rank}.sha256", sorted(_files_of(self.folder, rank)))
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write .metadata, which names the file on this disk where a tensor lies on several."""
        self.results = results
        near = self.ranks.on_disk
        far = [result for rank, result in enumerate(results) if rank not in near]
        super().finish(metadata, far + [results[rank] for rank in near])

    def storage_meta(self) -> None:
        """Nothing: the path of the folder, which is renamed, is not part of it."""

    def finish_on_disks(self, metadata: Metadata) -> None:
        """Write .metadata on the disks that rank 0 does not see."""
        if len(set(self.ranks.disks)) > 1:
            results = self.ranks.from_main(self.results)
            if self.ranks.leads and not self.ranks.world.main:
                self.finish(replace(metadata), results)


class Reader(FileSystemReader):
    """Reads what `Writer` wrote, and runs no code that the files might hold."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        super().__init__(folder)
        self.ranks = ranks

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with Path(self.path, METADATA).open("rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Raises ValueError if this rank needs a file that is not there, as on a disk of another machine."""
        names = sorted({self.storage_data[item.storage_index].relative_path for item in plan.items})
        if missing := [name for name in names if not Path(self.path, name).exists()]:
            raise ValueError(
                f"resume: got {self.path} without {missing[0]} on the disk of rank {self.ranks.world.rank}, "
                "expected the files of all ranks that this layout reads: copy those of all machines into "
                "this folder"
            )
        return super().read_data(plan, planner)


class _Unpickler(pickle.Unpickler):
    """Knows the classes of a checkpoint's metadata alone: a pickle may name any function, and calls it."""

    def find_class(self, module: str, name: str) -> Any:
        known = (
            module == "torch.distributed.checkpoint.metadata"
            or (module, name) == ("torch.distributed.checkpoint.filesystem", "_StorageInfo")
            or (module, name) in (("torch", "Size"), ("torch.serialization", "_get_layout"))
            or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype))
        )
        if not known:
            raise pickle.UnpicklingError(
                f"{METADATA}: got {module}.{name}, expected the classes of a checkpoint"
            )
        return super().find_class(module, name)


def seal(folder: Path) -> None:
    """Write the manifest of a disk's folder, and sync it; the ranks' files are on the disk already."""
    names = [path.name for path in sorted(folder.glob("rank-*.sha256"))]
    for name in (STATE, METADATA):
        sync(folder / name)
    write_hashes(folder, folder / MANIFEST, [*names, STATE, METADATA])
    sync(folder)


def find_damage(folder: Path, ranks: Ranks | None = None) -> str | None:
    """How a sealed folder differs from its manifests; None if it does not.

    With `ranks`, all of them call it: each verifies its share of the files on its disk, and all get the same
    answer.
    """
    found = _find_damage(folder, ranks)
    return found if ranks is None else next(filter(None, ranks.gather(found)), None)


def _find_damage(folder: Path, ranks: Ranks | None) -> str | None:
    manifest = folder / MANIFEST
    if not manifest.exists():
        return f"it has no {MANIFEST}"
    try:
        listed = list_hashes(manifest)
        if listed is None or METADATA not in listed:
            return f"its list of files does not agree with {MANIFEST}"
        if change := find_change(folder, manifest, listed):
            return change
        files = []
        for path in sorted(folder.glob("rank-*.sha256")):
            hashes = list_hashes(path)
            if hashes is None:
                return f"{path.name} is no list of hashes"
            files += [(path, line) for line in hashes.items()]
        near = ranks.on_disk if ranks is not None else [0]
        place = near.index(ranks.world.rank) if ranks is not None else 0
        changes = (find_change(folder, path, dict([line])) for path, line in files[place :: len(near)])
        return next(filter(None, changes), None)
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read: {error.strerror}"


def _files_of(folder: Path, rank: int) -> list[str]:
    return [path.name for path in folder.glob(f"__{rank}_*.distcp")]
