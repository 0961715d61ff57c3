"""Checkpoints and metrics that a disk, a copy or a kill has damaged; what is synced and renamed, in which
order."""

import dataclasses
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastalign.stages import dpo, merge, ppo, pretrain, sft
from fastalign.stages.runs import checkpoint, files
from fastalign.stages.runs.checkpoint_storage import find_damage, seal
from fastalign.stages.runs.distributed import World
from tests.stages.tiny import lines, sentence, weights, write

Pretraining = Callable[..., pretrain.PretrainConfig]
ALONE = World(0, 1, torch.device("cpu"))
FILES = ("__0_0.distcp", ".metadata", "state.json", "rank-0.sha256", files.MANIFEST)


class Killed(BaseException):
    """The run's process ends."""


def flip(path: Path, *, place: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def two_checkpoints(pretraining: Pretraining) -> Path:
    """The output_dir of a run with whole checkpoints of its steps 1 and 2."""
    config = pretraining(max_steps=2, save_every=1)
    pretrain.run(config)
    return Path(config.output_dir)


def test_72_flipped_bits_and_27_cuts_are_all_seen(
    pretraining: Pretraining, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = two_checkpoints(pretraining)
    draw = random.Random(0)
    for trial in range(99):
        copy = tmp_path / f"copy{trial}"
        shutil.copytree(run / "checkpoints", copy / "checkpoints")
        newest = copy / "checkpoints" / "step-00000002"
        damaged = newest / FILES[trial % len(FILES)]
        if trial < 72:
            flip(damaged, place=draw.randrange(damaged.stat().st_size), bit=draw.randrange(8))
        else:
            os.truncate(damaged, draw.randrange(damaged.stat().st_size))
        capsys.readouterr()
        assert checkpoint.latest_whole(str(copy), ALONE) == newest.with_name("step-00000001"), trial
        said = capsys.readouterr().out
        assert said.count("\n") == 1 and f"resume: {newest} is damaged (" in said, said
        assert damaged.name in said and ".sha256" in said
        assert checkpoint.latest_whole(str(copy), ALONE) == newest.with_name("step-00000001")
        assert capsys.readouterr().out == "", "said once"
        shutil.rmtree(copy)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", files.MANIFEST])
def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before_and_ends_as_if_it_were_whole(
    pretraining: Pretraining, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = pretraining(max_steps=2, save_every=1)
    pretrain.run(config)
    damaged = Path(config.output_dir, "checkpoints", "step-00000002")
    size = (damaged / name).stat().st_size
    flip(damaged / name, place=size // 2, bit=3)
    pretrain.run(dataclasses.replace(config, max_steps=4, resume=True))
    said = capsys.readouterr().out
    assert f"resume: {damaged} is damaged" in said and f"resume: {damaged.with_name('step-00000001')}" in said
    names = sorted(path.name for path in damaged.parent.iterdir())
    assert names == ["step-00000002.damaged", "step-00000003", "step-00000004"]
    # From step 1 on with 4 steps in sight, as a run that was killed after step 1 goes on.
    expected = pretraining(max_steps=1, save_every=1)
    pretrain.run(dataclasses.replace(expected, max_steps=2))
    shutil.rmtree(Path(expected.output_dir, "checkpoints", "step-00000002"))
    pretrain.run(dataclasses.replace(expected, max_steps=4, resume=True))
    assert lines(config) == lines(expected)
    assert all(torch.equal(tensor, weights(config)[name]) for name, tensor in weights(expected).items())


def test_without_a_whole_checkpoint_a_resume_is_refused(pretraining: Pretraining) -> None:
    config = pretraining(max_steps=2, save_every=1)
    pretrain.run(config)
    folder = Path(config.output_dir, "checkpoints")
    (folder / "step-00000001" / files.MANIFEST).unlink()
    os.truncate(folder / "step-00000002" / "__0_0.distcp", 100)
    with pytest.raises(ValueError) as refused:
        pretrain.run(dataclasses.replace(config, resume=True))
    assert str(refused.value) == (
        f"resume: got no whole checkpoint in {config.output_dir!r} (step-00000002: __0_0.distcp does not "
        "agree with rank-0.sha256; step-00000001: it has no manifest.sha256), expected at least one: bring "
        "one back from a copy, or name another output_dir"
    )
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000002"], (
        "nothing is renamed then"
    )


def test_a_missing_file_and_one_that_cannot_be_read_are_damage(
    pretraining: Pretraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = two_checkpoints(pretraining) / "checkpoints" / "step-00000002"
    assert find_damage(newest) is None

    def broken(path: Path) -> bytes:
        raise OSError(5, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(files, "_line", broken)
        assert find_damage(newest) == "rank-0.sha256 cannot be read: Input/output error"
    (newest / "__0_0.distcp").unlink()
    assert find_damage(newest) == "__0_0.distcp, which rank-0.sha256 lists, is missing"


def test_metadata_that_names_a_function_is_not_run(pretraining: Pretraining, tmp_path: Path) -> None:
    """.metadata is a pickle. One of a stranger's, sealed by the stranger, must not run code."""
    config = pretraining(max_steps=1, save_every=1)
    pretrain.run(config)
    found = Path(config.output_dir, "checkpoints", "step-00000001")

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "done"),)

    (found / ".metadata").write_bytes(pickle.dumps(Evil()))
    seal(found)
    with pytest.raises(
        pickle.UnpicklingError, match=r"\.metadata: got (posix|os)\.mkdir, expected the classes"
    ):
        pretrain.run(dataclasses.replace(config, resume=True))
    assert not (tmp_path / "done").exists()


def test_stray_files_beside_and_in_checkpoints_do_not_stop_a_resume(pretraining: Pretraining) -> None:
    config = pretraining(max_steps=2, save_every=1)
    pretrain.run(config)
    folder = Path(config.output_dir, "checkpoints")
    (folder / "step-00000009").write_text("a file")
    (folder / "step-notes").mkdir()
    (folder / "zzz").write_text("x")
    (folder / "step-00000002" / "notes.txt").write_text("x")
    assert pretrain.run(dataclasses.replace(config, resume=True, max_steps=3))["step"] == 3


def test_a_bad_last_line_of_the_metrics_is_cut_off_and_said_and_another_is_refused(
    pretraining: Pretraining, capsys: pytest.CaptureFixture[str]
) -> None:
    config = pretraining(max_steps=2, save_every=1)
    pretrain.run(config)
    path = Path(config.output_dir, "metrics.jsonl")
    written = path.read_bytes()
    again = dataclasses.replace(config, resume=True)
    for rest in (b'{"step": 3, "lo', b"\x00" * 20 + b"\n", b'{"step": 3, "loss": \xff}\n', b"7\n"):
        path.write_bytes(written + rest)
        capsys.readouterr()
        pretrain.run(again)
        assert (
            f"resume: {path}: line 4, the last, is not whole and is cut off: {rest!r}"
            in capsys.readouterr().out
        )
        assert path.read_bytes() == written
    path.write_bytes(written[:10] + b"\n" + written)
    with pytest.raises(
        ValueError,
        match=r"resume: .*metrics\.jsonl .*, expected a line of metrics\.jsonl: mend it or delete it",
    ):
        pretrain.run(again)


class Disk:
    """What is synced and renamed below `root`: ("sync", name) and ("rename", name); `kill_at` ends the
    process before that one."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int | None = None) -> None:
        self.root, self.events, self.kill_at = root.resolve(), list[tuple[str, str]](), kill_at
        self.renamed: list[tuple[Path, Path]] = []
        self.whole: set[Path] = set()
        fsync, replace = os.fsync, os.replace

        def record_sync(number: int) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{number}"))
            self._note("sync", path)
            self.whole.add(path)
            fsync(number)

        def record_replace(source: Any, target: Any) -> None:
            source, target = Path(source).resolve(), Path(target).resolve()
            self._note("rename", target)
            if (
                ".replaced" not in target.name
                and target.name != "unfinished"
                and ".damaged" not in target.name
            ):
                content = [source, *source.rglob("*")]
                assert {path for path in content if path not in self.whole} == set(), (
                    "all that is renamed is on the disk"
                )
            replace(source, target)
            self.renamed.append((source, target))

        monkeypatch.setattr(os, "fsync", record_sync)
        monkeypatch.setattr(os, "replace", record_replace)

    def _note(self, what: str, path: Path) -> None:
        if len(self.events) == self.kill_at:
            raise Killed
        self.events.append(
            (what, str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path))
        )


MODEL = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]


def test_every_file_of_a_run_is_synced_then_renamed_then_its_folder_synced(
    pretraining: Pretraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = pretraining(max_steps=1, save_every=1)
    disk = Disk(Path(config.output_dir), monkeypatch)
    pretrain.run(config)
    new = "checkpoints/unfinished/"
    in_model = sorted(("sync", f"model.unfinished/{name}") for name in MODEL)
    events = disk.events
    first = events.index(("sync", "metrics.jsonl")) + 1
    assert events[:first] == [
        *[("sync", "config.yaml.unfinished"), ("rename", "config.yaml"), ("sync", ".")],
        *[("sync", "metrics.jsonl.unfinished"), ("rename", "metrics.jsonl"), ("sync", ".")],
        ("sync", "metrics.jsonl"),
    ]
    written = ["__0_0.distcp", "rank-0.sha256", ".metadata.tmp", "state.json", ".metadata", files.MANIFEST]
    saved = [*[("sync", new + name) for name in written], ("sync", new[:-1])]
    saved += [("rename", "checkpoints/step-00000001"), ("sync", "checkpoints"), ("sync", ".")]
    assert events[first : first + len(saved)] == saved
    assert sorted(events[first + len(saved) : -3]) == in_model
    assert events[-3:] == [("sync", "model.unfinished"), ("rename", "model"), ("sync", ".")]
    assert sorted(path.name for path in Path(config.output_dir).iterdir()) == [
        "checkpoints",
        "config.yaml",
        "lock",
        "metrics.jsonl",
        "model",
    ]


def test_the_files_of_other_commands_are_renamed_when_they_are_on_the_disk(
    tuning: Callable[..., sft.SFTConfig], base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = write(
        tmp_path / "pairs.jsonl",
        [{"prompt": sentence(n), "chosen": " good", "rejected": " bad"} for n in range(4)],
    )
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": sentence(n)} for n in range(4)])
    (tmp_path / "score.py").write_text(
        "def score(prompts, completions):\n    return [float(len(text)) for text in completions]\n"
    )
    options: dict[str, Any] = {
        "model": base,
        "batch_size": 4,
        "max_steps": 1,
        "device": "cpu",
        "dtype": "float64",
    }
    disk = Disk(tmp_path, monkeypatch)

    adapters = tuning(lora_rank=2)
    sft.run(adapters)
    merge.run(merge.MergeConfig(model=f"{adapters.output_dir}/model", output_dir=str(tmp_path / "merged")))
    dpo.run(
        dpo.DPOConfig(
            **options,
            train_data=pairs,
            output_dir=str(tmp_path / "dpo"),
            reference="precomputed",
            max_length=64,
        )
    )
    scored: dict[str, Any] = {
        "reward": f"{tmp_path / 'score.py'}:score",
        "max_new_tokens": 4,
        "ppo_epochs": 1,
    }
    ppo.run(ppo.PPOConfig(**options, **scored, train_data=prompts, output_dir=str(tmp_path / "ppo")))

    targets = [str(target.relative_to(tmp_path)) for _, target in disk.renamed]
    table = next(path.name for path in (tmp_path / "dpo").glob("reference-*.safetensors"))
    run = ["config.yaml", "metrics.jsonl", "model"]
    assert targets == [
        *[f"sft0/{name}" for name in run],
        "merged",
        *[f"dpo/{name}" for name in [table, *run]],
        *[f"ppo/{name}" for name in ["config.yaml", "metrics.jsonl", "value", "model"]],
    ]
    for number, event in enumerate(disk.events):
        if event[0] == "rename":
            assert disk.events[number + 1] == ("sync", str(Path(event[1]).parent))

    path = tmp_path / "dpo" / table
    flip(path, place=path.stat().st_size - 3, bit=2)
    with pytest.raises(
        ValueError, match=r"reference: .*safetensors, whose hash is not that of its values, .*delete it"
    ):
        dpo.run(
            dpo.DPOConfig(
                **options,
                train_data=pairs,
                output_dir=str(tmp_path / "dpo2"),
                max_length=64,
                reference="precomputed",
                reference_dir=str(tmp_path / "dpo"),
            )
        )


def test_a_kill_at_any_rename_of_a_resumed_run_loses_nothing(
    pretraining: Pretraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = pretraining(max_steps=2, save_every=1, schedule="constant")
    pretrain.run(dataclasses.replace(config, max_steps=1))
    again = dataclasses.replace(config, resume=True)
    begun, done = Path(config.output_dir + "-begun"), Path(config.output_dir + "-done")
    shutil.copytree(config.output_dir, begun)

    def resume(kill_at: int | None) -> list[tuple[str, str]]:
        shutil.rmtree(config.output_dir)
        shutil.copytree(begun, config.output_dir)
        with monkeypatch.context() as patch:
            disk = Disk(Path(config.output_dir), patch, kill_at)
            try:
                pretrain.run(again)
            except Killed:
                assert len(disk.events) == kill_at
        return disk.events

    renames = [number for number, event in enumerate(resume(None)) if event[0] == "rename"]
    assert len(renames) == 5, "config.yaml, metrics.jsonl, the checkpoint, the old model, the new one"
    shutil.copytree(config.output_dir, done)
    expected, metrics = weights(config), lines(config)
    for kill_at in sorted({*renames, *(number + 1 for number in renames)}):
        resume(kill_at)
        pretrain.run(again)
        assert lines(config) == metrics
        assert all(torch.equal(tensor, weights(config)[name]) for name, tensor in expected.items())
        inside = sorted(
            str(path.relative_to(config.output_dir)) for path in Path(config.output_dir).rglob("*")
        )
        assert inside == sorted(str(path.relative_to(done)) for path in done.rglob("*")), (
            "nothing half-written stays"
        )


def test_models_of_no_run_are_not_replaced(pretraining: Pretraining, tmp_path: Path, no_model: None) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "weights").write_text("x")
    with pytest.raises(
        ValueError,
        match=r"output_dir: got files in '.*mine/model' that no run left and this run would replace",
    ):
        pretrain.run(pretraining(output_dir=str(tmp_path / "mine"), resume=True))
