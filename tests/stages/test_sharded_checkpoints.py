"""Checkpoints of two ranks: each writes its part, and they are read on another layout; run as a script, this
is a rank."""

import os
import random
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fastalign.stages.config import TrainConfig
from fastalign.stages.runs import checkpoint_storage
from fastalign.stages.runs.checkpoint import Checkpoints
from fastalign.stages.runs.distributed import World
from tests.stages.tiny import read_tensors
from tests.two_ranks import be_a_rank, run_as_two_ranks

ALONE = World(0, 1, torch.device("cpu"))


class Net(nn.Module):
    """Uneven over two ranks: 7 rows, and a vector of one element, of which a rank gets none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 4)
        self.layer = nn.Linear(4, 7)
        self.scale = nn.Parameter(torch.ones(1))
        self.unused = nn.Parameter(torch.ones(3))  # never has a gradient, so the optimizer has no state of it
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, ids: Tensor) -> Tensor:
        self.seen.add_(1)
        return self.scale * self.layer(nn.functional.dropout(self.embedding(ids), 0.3))


class Run(NamedTuple):
    """A training of `Net` in fp64 and its checkpoints."""

    model: nn.Module
    called: nn.Module
    optimizer: torch.optim.Optimizer
    checkpoints: Checkpoints
    world: World
    noise: list[float]

    def train(self, first: int, end: int) -> None:
        """Steps from `first` to before `end`, on rows that follow from step and rank."""
        for step in range(first, end):
            ids = torch.arange(6).view(2, 3)[self.world.rank % 2] + step
            # Three draws in two steps: Python keeps the second number of a pair, and so must a checkpoint.
            self.noise.extend(random.gauss(0, 1) for _ in range(step + 1))
            output = self.called(ids % 7 if self.world.size > 1 else (torch.arange(6) + step) % 7)
            (output**2).mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def weights(self) -> dict[str, Tensor]:
        """The whole weights, on all ranks."""
        found = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        return {
            name: (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()
            for name, x in found.items()
        }


@contextmanager
def begin(folder: Path, world: World, layout: str = "alone", **options: Any) -> Iterator[Run]:
    """A run in `folder`; layout: alone, ddp or fsdp."""
    model = Net().double()
    called: nn.Module = model
    if layout == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",)))
    if layout == "ddp":
        called = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    config = TrainConfig(train_data="rows", output_dir=str(folder), keep_checkpoints=9, **options)
    torch.manual_seed(5 + world.rank)
    random.seed(5 + world.rank)
    with Checkpoints(config, world, model, optimizer) as checkpoints:
        yield Run(model, called, optimizer, checkpoints, world, [])


def resume(run: Run) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        state = run.checkpoints.load_latest(rows=4)
    assert state is not None
    return int(state["step"])


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


# What a rank does


def interrupt(folder: Path, world: World, layout: str, **options: Any) -> None:
    """A run of four steps, and one that goes on in a new process' place after two, end with the same bits."""
    with begin(folder / layout / "whole", world, layout) as run:
        run.train(0, 4)
        expected, noise = run.weights(), run.noise
    with begin(folder / layout / "run", world, layout, **options) as run:
        run.train(0, 2)
        run.checkpoints.save(step=2, rows=4)
        at_save = run.weights()
        run.train(2, 3)  # what comes after the call must not reach the checkpoint
    with begin(folder / layout / "run", world, layout) as run:
        assert resume(run) == 2
        assert_same(run.weights(), at_save)
        unused = dict(run.model.named_parameters())["unused"]
        assert unused not in run.optimizer.state
        run.train(2, 4)
        assert_same(run.weights(), expected)
        assert run.noise == noise[3:]
    if world.main:
        torch.save(at_save, folder / layout / "at_save.pt")


def load_elsewhere(folder: Path, world: World) -> None:
    """What one process wrote is read by shards, and what shards wrote by DistributedDataParallel."""
    for source, layout in (("alone", "fsdp"), ("fsdp", "ddp"), ("ddp", "fsdp")):
        copy = folder / f"{source}-{layout}"
        if world.main:
            shutil.copytree(folder / source / "run", copy)
        dist.barrier()
        with begin(copy, world, layout) as run:
            with pytest.warns(UserWarning) if world.main else warnings.catch_warnings() as warned:
                state = run.checkpoints.load_latest(rows=4)
            if world.main:
                text = str(warned[0].message)  # type: ignore[index]
                assert "resuming on 2 processes" in text and "equal to rounding" in text
            assert state is not None and state["step"] == 2
            assert_same(run.weights(), torch.load(folder / source / "at_save.pt"))
            run.train(2, 3)


def use_two_disks(folder: Path, world: World) -> None:
    """Each rank is a node with a disk of its own."""
    os.environ["LOCAL_RANK"] = "0"
    for layout in ("fsdp", "ddp"):
        disk = folder / "disks" / layout / str(world.rank)
        with begin(disk, world, layout) as run:
            run.train(0, 2)
            run.checkpoints.save(step=2, rows=4)
            expected = run.weights()
        with begin(disk, world, layout) as run:
            assert resume(run) == 2
            assert_same(run.weights(), expected)
        damage_one_disk(disk, world, layout)
    os.environ["LOCAL_RANK"] = str(world.rank)


def damage_one_disk(disk: Path, world: World, layout: str) -> None:
    """A newer checkpoint that is damaged on one disk is set aside on both; one on a single disk is none."""
    with begin(disk, world, layout) as run:
        run.train(0, 1)
        run.checkpoints.save(step=3, rows=4)
    dist.barrier()
    newest = disk / "checkpoints" / "step-00000003"
    if world.rank == 1:
        file = next(newest.glob("__*.distcp"))
        os.truncate(file, file.stat().st_size // 2)
        shutil.copytree(newest, newest.with_name("step-00000004"))
    dist.barrier()
    with begin(disk, world, layout) as run:
        assert resume(run) == 2
    dist.barrier()
    assert newest.with_name("step-00000003.damaged").is_dir() and not newest.exists()


def fail_on_rank_1(folder: Path, world: World) -> None:
    """The error of the rank that fails is raised on both, whatever thread writes."""
    write = checkpoint_storage.write_hashes

    def full(written: Path, *rest: Any) -> None:
        raise OSError(28, "No space left on device")

    for asynchronous in (False, True):
        checkpoint_storage.write_hashes = full if world.rank == 1 else write  # type: ignore[assignment]
        with (
            pytest.raises(OSError, match=r"output_dir: got .* free in .*No space left on device"),
            begin(folder / "full", world, "fsdp", async_checkpoints=asynchronous) as run,
        ):
            run.train(0, 1)
            run.checkpoints.save(step=1, rows=4)
        checkpoint_storage.write_hashes = write
        assert not list((folder / "full" / "checkpoints").glob("step-*"))


def run_rank(folder: Path, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    world = World(rank, 2, torch.device("cpu"))
    os.environ["LOCAL_RANK"] = str(rank)
    scenarios: list[Callable[[], None]] = [
        lambda: interrupt(folder, world, "fsdp", async_checkpoints=True),
        lambda: interrupt(folder, world, "ddp"),
        lambda: load_elsewhere(folder, world),
        lambda: use_two_disks(folder, world),
        lambda: fail_on_rank_1(folder, world),
    ]
    for scenario in scenarios:
        scenario()
        dist.barrier()


# What the tests see


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two ranks did all of the above, after a run of one process there."""
    folder = tmp_path_factory.mktemp("ranks")
    interrupt(folder, ALONE, "alone")
    run_as_two_ranks(__file__, folder)
    return folder


@pytest.mark.parametrize("layout", ["fsdp", "ddp"])
def test_what_two_ranks_wrote_is_read_by_one_process(layout: str, ranks: Path, tmp_path: Path) -> None:
    shutil.copytree(ranks / layout / "run", tmp_path / "run")
    with begin(tmp_path / "run", ALONE) as run:
        with pytest.warns(
            UserWarning, match="resuming on 1 processes a run of 2.*equal to rounding.*dropout"
        ):
            state = run.checkpoints.load_latest(rows=4)
        assert state is not None and state["step"] == 2
        assert_same(run.weights(), torch.load(ranks / layout / "at_save.pt"))
        run.train(2, 3)


def test_each_rank_writes_a_part(ranks: Path) -> None:
    found = ranks / "fsdp" / "run" / "checkpoints" / "step-00000002"
    sizes = [(found / f"__{rank}_0.distcp").stat().st_size for rank in range(2)]
    assert min(sizes) > 0.4 * sum(sizes)
    tensors = read_tensors(found)
    assert tensors["optimizer.embedding.weight.exp_avg"].shape == (7, 4)
    assert {name.partition(".")[0] for name in tensors} == {"model", "optimizer", "random"}


def test_a_disk_of_another_machine_is_named_and_a_copy_of_its_files_mends_it(
    ranks: Path, tmp_path: Path
) -> None:
    disks = ranks / "disks" / "fsdp"
    shutil.copytree(disks / "0", tmp_path / "run")
    with (
        pytest.raises(
            ValueError, match=r"resume: got .*step-00000002 without __1_0\.distcp on the disk of rank 0"
        ),
        begin(tmp_path / "run", ALONE) as run,
    ):
        resume(run)
    for name in ("__1_0.distcp", "rank-1.sha256"):
        place = Path("checkpoints", "step-00000002", name)
        shutil.copy(disks / "1" / place, tmp_path / "run" / place)
    with begin(tmp_path / "run", ALONE) as run:
        assert resume(run) == 2


def test_a_replica_lies_on_each_disk(ranks: Path, tmp_path: Path) -> None:
    shutil.copytree(ranks / "disks" / "ddp" / "1", tmp_path / "run")
    with begin(tmp_path / "run", ALONE) as run:
        assert resume(run) == 2


def test_a_checkpoint_is_written_beside_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = checkpoint_storage.write_hashes

    def slow(*arguments: Any) -> None:
        time.sleep(0.3)
        write(*arguments)

    monkeypatch.setattr(checkpoint_storage, "write_hashes", slow)
    newest = tmp_path / "checkpoints" / "step-00000001"
    with begin(tmp_path, ALONE, async_checkpoints=True) as run:
        run.train(0, 1)
        run.checkpoints.save(step=1, rows=4)
        run.checkpoints.finish(wait=False)
        assert not newest.exists(), "save waits for the disk"
        run.checkpoints.finish()
        assert newest.is_dir()


if __name__ == "__main__":
    be_a_rank(run_rank)
