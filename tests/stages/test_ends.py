"""How a run ends before its last step: by a signal, by a full disk, by another run in its folder."""

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fastalign.faults import Stopped
from fastalign.stages import pretrain
from fastalign.stages.config import parse
from fastalign.stages.runs import checkpoint, checkpoint_storage, reporters, run_folder, signals
from fastalign.stages.runs.distributed import World
from fastalign.stages.runs.files import write_hashes
from tests.stages.tiny import LLAMA, lines, weights

Make = Callable[..., pretrain.PretrainConfig]


@pytest.fixture
def signal_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that lets signals come while the line of a step is written."""
    write = reporters.Report.write

    def arrange(step: int, *numbers: int) -> None:
        def write_and_raise(self: reporters.Report, line: dict[str, Any]) -> None:
            write(self, line)
            if line["step"] == step:
                for number in numbers:
                    signal.raise_signal(number)

        monkeypatch.setattr(reporters.Report, "write", write_and_raise)

    return arrange


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_the_command_that_it_names_goes_on_bitwise(
    pretraining: Make, signal_at: Callable[..., None], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    options = {"model_config": LLAMA | {"attention_dropout": 0.2}, "max_steps": 5}  # and no save_every
    whole, stopped = pretraining(**options), pretraining(**options)
    pretrain.run(whole)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        signal_at(3, number)
        with pytest.raises(Stopped) as stop:
            pretrain.run(stopped)
        patch.undo()
    monkeypatch.undo()
    assert stop.value.number == number
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    saved = f"{stopped.output_dir}/config.yaml"
    assert (
        str(stop.value)
        == f" after step 3, which is saved; go on with: fastalign pretrain --config {saved} resume=true"
    )
    assert [path.name for path in Path(stopped.output_dir, "checkpoints").iterdir()] == ["step-00000003"]

    pretrain.run(
        parse(pretrain.PretrainConfig, str(stop.value).split("fastalign pretrain ")[1].split(), prog="")
    )
    assert lines(stopped) == lines(whole)
    expected, found = weights(whole), weights(stopped)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_signal_during_the_first_evaluation_ends_before_the_first_step(
    pretraining: Make, signal_at: Callable[..., None]
) -> None:
    config = pretraining()
    signal_at(0, signal.SIGTERM)
    with pytest.raises(Stopped, match=" after step 0, before the next; go on with: "):
        pretrain.run(config)
    assert not Path(config.output_dir, "checkpoints").exists()


def test_a_signal_in_the_last_step_lets_the_run_end_as_it_would(
    pretraining: Make, signal_at: Callable[..., None]
) -> None:
    config = pretraining(max_steps=2)
    signal_at(2, signal.SIGTERM)
    assert pretrain.run(config)["step"] == 2
    assert weights(config)


def test_a_second_ctrl_c_ends_at_once(
    pretraining: Make, signal_at: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = pretraining()
    monkeypatch.setattr(signals, "SAME", -1.0)
    signal_at(1, signal.SIGINT, signal.SIGINT)
    with pytest.raises(Stopped, match="at once, the second time"):
        pretrain.run(config)
    assert not Path(config.output_dir, "checkpoints").exists()


def test_one_ctrl_c_that_comes_twice_counts_once(pretraining: Make, signal_at: Callable[..., None]) -> None:
    # The terminal sends it to all processes, and torchrun to its ranks once more.
    signal_at(1, signal.SIGINT, signal.SIGINT)
    with pytest.raises(Stopped, match="after step 1, which is saved"):
        pretrain.run(pretraining())


def test_ranks_go_on_with_torchrun(pretraining: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    config = pretraining(output_dir="runs/a b")
    expected = (
        "torchrun --nproc-per-node 4 -m fastalign.stages.pretrain --config 'runs/a b/config.yaml' resume=true"
    )
    assert signals.how_to_resume(config, World(0, 8, torch.device("cpu"))) == expected


def test_stray_files_beside_the_checkpoints_do_not_stop_a_resume(pretraining: Make) -> None:
    config = pretraining(max_steps=2, save_every=1, keep_checkpoints=1)
    result = pretrain.run(config)
    checkpoints = Path(config.output_dir, "checkpoints")
    (checkpoints / "step-notes.txt").write_text("mine")
    (checkpoints / "step-00000009").write_text("a file")
    shutil.copytree(checkpoints / "step-00000002", checkpoints / "step-00000002 (copy)")
    assert checkpoint.latest(config.output_dir) == checkpoints / "step-00000002"
    again = pretraining(
        max_steps=3, save_every=1, keep_checkpoints=1, resume=True, output_dir=config.output_dir
    )
    assert pretrain.run(again)["step"] == result["step"] + 1
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "step-00000002 (copy)",
        "step-00000003",
        "step-00000009",
        "step-notes.txt",
    ]


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_disk_without_room_is_told_before_the_first_step(
    pretraining: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 2**16))
    config = pretraining(save_every=1)
    with pytest.raises(
        OSError,
        match=(
            rf"output_dir: got 0.1 MiB free in '{config.output_dir}', "
            r"expected 1\.\d MiB for 3 checkpoints and the model"
        ),
    ):
        pretrain.run(config)
    assert not Path(config.output_dir, "metrics.jsonl").exists()


@pytest.mark.parametrize("how", ["room", "write"])
def test_a_disk_that_fills_up_is_told_and_the_old_checkpoint_stays(
    pretraining: Make, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    config = pretraining(save_every=2, keep_checkpoints=1)
    usage = shutil.disk_usage
    lists: list[Path] = []

    def full_at_step_4(folder: Path, listed_in: Path, names: Sequence[str]) -> None:
        lists.append(listed_in)  # two of a checkpoint: the rank's, and the manifest
        if how == "write" and len(lists) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_hashes(folder, listed_in, names)
        if how == "room" and len(lists) == 2:
            monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 2**16))

    monkeypatch.setattr(checkpoint_storage, "write_hashes", full_at_step_4)
    checkpoints = Path(config.output_dir, "checkpoints")
    message = (
        rf"output_dir: got \d.* free in '{checkpoints}', expected 0\.\d MiB for the checkpoint of step 4"
    )
    with pytest.raises(OSError, match=message):
        pretrain.run(config)
    assert checkpoint.latest(config.output_dir) == checkpoints / "step-00000002"
    monkeypatch.setattr(checkpoint_storage, "write_hashes", write_hashes)
    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert (
        pretrain.run(
            pretraining(save_every=2, keep_checkpoints=1, resume=True, output_dir=config.output_dir)
        )["step"]
        == 7
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_metrics_that_cannot_be_written_name_their_file(
    pretraining: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def enter(self: reporters.Report) -> reporters.Report:
        self.file = Path("/dev/full").open("w")  # noqa: SIM115
        return self

    monkeypatch.setattr(reporters.Report, "__enter__", enter)
    with pytest.raises(OSError, match="output_dir: got 'No space left on device' for /dev/full"):
        pretrain.run(pretraining())


def test_a_folder_that_another_run_holds_is_refused_with_its_process(pretraining: Make) -> None:
    config = pretraining()
    with run_folder.held("output_dir", Path(config.output_dir)), pytest.raises(ValueError) as refused:
        pretrain.run(config)
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    assert (
        str(refused.value) == f"output_dir: got {config.output_dir!r}, which is in use by {holder}, "
        "expected a folder that is not in use"
    )
    assert pretrain.run(config)["step"] == 7


def test_a_resumed_run_that_has_no_step_left_is_told(
    pretraining: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    config = pretraining(max_steps=2, save_every=1)
    pretrain.run(config)
    pretrain.run(replace(config, resume=True, max_steps=1))
    assert "resume: got a run of 2 steps, expected fewer than the 1 of max_steps" in capsys.readouterr().out


def test_a_folder_that_is_a_file_and_a_file_in_the_models_place_are_refused(
    pretraining: Make, tmp_path: Path
) -> None:
    config = pretraining()
    Path(config.output_dir).mkdir(parents=True)
    Path(config.output_dir, "model").write_text("mine")
    with pytest.raises(ValueError, match="output_dir: got a file '.*model' that no run left"):
        pretrain.run(config)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"output_dir: got '.*file' \(File exists\), expected a folder"):
        pretrain.run(pretraining(output_dir=str(tmp_path / "file")))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
        RuntimeError("PytorchStreamWriter failed writing file data/0"),
        OSError(errno.EFBIG, "File too large"),
    ],
    ids=["closing", "writing", "limit"],
)
def test_what_torch_says_on_a_full_disk_is_told_as_that(tmp_path: Path, error: Exception) -> None:
    with (
        pytest.raises(OSError, match=r"output_dir: got .* free in .*, expected 1\.0 MiB for the model: "),
        run_folder.naming(tmp_path, 2**20, "the model"),
    ):
        raise error


def test_the_lock_of_a_process_that_was_killed_blocks_nobody(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from fastalign.stages.runs.run_folder import held
with held("output_dir", Path({str(tmp_path)!r})):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == -signal.SIGKILL
    assert (tmp_path / "lock").read_text().startswith("process ")
    with run_folder.held("output_dir", tmp_path):
        assert (tmp_path / "lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"


def test_a_file_system_without_locks_is_said_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with run_folder.held("output_dir", tmp_path):
        pass
    assert (
        capsys.readouterr().err
        == f"output_dir: {tmp_path} cannot be locked (No locks available): let no other run use it\n"
    )


def test_a_lock_may_be_waited_for(tmp_path: Path) -> None:
    came: list[str] = []

    def wait() -> None:
        with run_folder.held("reference_dir", tmp_path, wait=True):
            came.append("second")

    with run_folder.held("reference_dir", tmp_path):
        waiting = threading.Thread(target=wait)
        waiting.start()
        waiting.join(0.2)
        came.append("first")
    waiting.join(10)
    assert came == ["first", "second"]
