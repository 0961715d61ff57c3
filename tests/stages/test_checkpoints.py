"""Runs that are killed and resumed, and the checkpoints that they leave."""

import dataclasses
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fastalign.stages import pretrain
from fastalign.stages.runs import checkpoint, checkpoint_storage, reporters
from fastalign.stages.runs.files import write_hashes
from tests.stages.tiny import LLAMA, lines, weights


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(
    pretraining: Callable[..., pretrain.PretrainConfig],
    monkeypatch: pytest.MonkeyPatch,
    micro_batch_size: int | None,
) -> None:
    # Dropout makes the random states matter; step 4 of 4 rows in 11 or so ends in the middle of an epoch.
    options: dict[str, Any] = {
        "model_config": LLAMA | {"attention_dropout": 0.2},
        "save_every": 4,
        "eval_every": 3,
    }
    options |= {"micro_batch_size": micro_batch_size, "warmup_steps": 2}
    whole = pretraining(**options)
    pretrain.run(whole)

    class Killed(BaseException):
        """The run's process ends."""

    write = reporters.Report.write

    def write_until_six(self: reporters.Report, line: dict[str, Any]) -> None:
        write(self, line)
        if line["step"] == 6:
            raise Killed

    stopped = pretraining(**options)
    with monkeypatch.context() as patch:
        patch.setattr(reporters.Report, "write", write_until_six)
        with pytest.raises(Killed):
            pretrain.run(stopped)
    assert [line["step"] for line in lines(stopped)] == [
        0,
        1,
        2,
        3,
        4,
        5,
        6,
    ]  # 5 and 6 are after the checkpoint
    assert checkpoint.latest(stopped.output_dir).name == "step-00000004"  # type: ignore[union-attr]
    rows = lines(whole)[-1]["step"] * 4 / lines(whole)[-1]["epoch"]
    assert 4 * 4 % rows != 0, "step 4 must not be an epoch's end"

    with Path(stopped.output_dir, "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # killed while writing
    resumed = dataclasses.replace(stopped, resume=True)
    torch.randn(3)  # what the process did before must not matter
    result = pretrain.run(resumed)

    assert lines(resumed) == lines(whole)
    assert result["step"] == 7
    expected, found = weights(whole), weights(resumed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_dropout_noise_is_what_the_resume_test_restores(
    pretraining: Callable[..., pretrain.PretrainConfig],
) -> None:
    # Without this, the test above could pass with random states that are never restored.
    with_noise = pretraining(model_config=LLAMA | {"attention_dropout": 0.2}, max_steps=2)
    without = pretraining(max_steps=2)
    pretrain.run(with_noise)
    pretrain.run(without)
    assert lines(with_noise)[0] == lines(without)[0]  # evaluation draws none
    assert lines(with_noise)[1]["loss"] != lines(without)[1]["loss"]


def test_resume_refuses_another_place_in_the_data_and_says_what_else_changed(
    pretraining: Callable[..., pretrain.PretrainConfig],
    files: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = pretraining(max_steps=2, save_every=2)
    pretrain.run(first)
    again = {"output_dir": first.output_dir, "resume": True}
    for name, value in (("seed", 1), ("batch_size", 2), ("train_data", files["held_out"])):
        with pytest.raises(ValueError, match=rf"resume: got {name}=.*{value!r}.*, as when the run"):
            pretrain.run(pretraining(**again | {name: value}))
    with pytest.raises(ValueError, match=r"resume: got rows=\d+, expected \d+, as when the run"):
        pretrain.run(pretraining(**again, sequence_length=64))
    with pytest.raises(ValueError, match=r"resume: got a model that differs from .* in .*layers\.2"):
        pretrain.run(pretraining(**again, model_config=LLAMA | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match="which holds a run, expected a new folder"):
        pretrain.run(pretraining(output_dir=first.output_dir))
    capsys.readouterr()
    pretrain.run(pretraining(**again, max_steps=3, learning_rate=2e-2))
    printed = capsys.readouterr().out
    assert "resuming with learning_rate=0.02 (before: 0.01)" in printed
    assert "resuming with max_steps=3 (before: 2)" in printed and "another tokenizer" not in printed
    assert [line["step"] for line in lines(first)] == [0, 1, 2, 3]
    template = Path(files["tokenizer"], "chat_template.jinja")
    before = template.read_text() if template.exists() else None
    template.write_text("{{ messages }}")  # the folder keeps its name
    try:
        pretrain.run(pretraining(**again, max_steps=3))
    finally:
        template.unlink() if before is None else template.write_text(before)
    assert "resuming with another tokenizer or chat template than before" in capsys.readouterr().out


def test_a_resume_with_another_weight_decay_decays_by_it(
    pretraining: Callable[..., pretrain.PretrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pretraining(max_steps=1, save_every=1, weight_decay=0.1)
    pretrain.run(first)
    decays: list[list[float]] = []
    step = torch.optim.AdamW.step

    def record(self: torch.optim.AdamW, **options: Any) -> None:
        decays.append([group["weight_decay"] for group in self.param_groups])
        step(self, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    pretrain.run(dataclasses.replace(first, max_steps=2, resume=True, weight_decay=0.3))
    assert decays[-1] == [0.3, 0.0]


def test_a_resume_with_another_number_of_threads_says_so_once(
    pretraining: Callable[..., pretrain.PretrainConfig],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = pretraining(max_steps=1, save_every=1)
    pretrain.run(config)
    resumed = dataclasses.replace(config, max_steps=2, resume=True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    pretrain.run(resumed)
    printed = capsys.readouterr().out
    assert printed.count("resuming with 3 CPU threads (before: 1): ") == 1 and "OMP_NUM_THREADS=1" in printed
    pretrain.run(dataclasses.replace(resumed, max_steps=3))
    assert "CPU threads" not in capsys.readouterr().out


def test_resume_refuses_other_rows_in_the_same_file(
    pretraining: Callable[..., pretrain.PretrainConfig], files: dict[str, str], tmp_path: Path
) -> None:
    path = Path(shutil.copy(files["text"], str(tmp_path)))
    first = pretraining(max_steps=2, save_every=2, train_data=str(path))
    pretrain.run(first)
    written = path.read_text().splitlines(keepends=True)
    again = dataclasses.replace(first, resume=True, max_steps=3)
    path.write_text("".join(written[::-1]))  # as many rows and tokens
    with pytest.raises(
        ValueError,
        match=r"resume: got other rows in .*, expected those with which the run in .*step-00000002 was",
    ):
        pretrain.run(again)
    path.write_text("".join(written))
    assert pretrain.run(again)["step"] == 3


def test_resume_without_a_checkpoint_starts_at_step_0_and_says_so(
    pretraining: Callable[..., pretrain.PretrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    config = pretraining(max_steps=1, resume=True)
    Path(config.output_dir).mkdir()
    Path(config.output_dir, "metrics.jsonl").write_text('{"step": 1, "loss": 7.0}\n{"step": 2, "lo')
    pretrain.run(config)
    assert "no checkpoint" in capsys.readouterr().out
    assert [line["step"] for line in lines(config)] == [0, 1]


def test_a_finished_run_resumes_to_itself(pretraining: Callable[..., pretrain.PretrainConfig]) -> None:
    config = pretraining(max_steps=2, save_every=1)
    result = pretrain.run(config)
    before, metrics = weights(config), lines(config)
    assert pretrain.run(dataclasses.replace(config, resume=True)) == result
    assert lines(config) == metrics
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(config).items())


def test_a_finished_run_that_resumes_deletes_what_a_kill_left_of_an_old_checkpoint(
    pretraining: Callable[..., pretrain.PretrainConfig],
) -> None:
    config = pretraining(max_steps=3, save_every=1, keep_checkpoints=2)
    pretrain.run(config)
    unfinished = Path(config.output_dir, "checkpoints", "unfinished")
    shutil.copytree(unfinished.with_name("step-00000002"), unfinished.with_name("step-00000001"))
    unfinished.mkdir()
    (unfinished / "__0_0.distcp").write_bytes(b"of a checkpoint that was being deleted")
    pretrain.run(dataclasses.replace(config, resume=True))
    assert sorted(path.name for path in unfinished.parent.iterdir()) == ["step-00000002", "step-00000003"]


def test_the_last_checkpoints_stay_and_a_kill_while_writing_leaves_none_in_halves(
    pretraining: Callable[..., pretrain.PretrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = pretraining(save_every=1, keep_checkpoints=2, max_steps=5)
    saved: list[str] = []

    def killed_at_step_5(folder: Path, listed_in: Path, names: Sequence[str]) -> None:
        saved.extend(names if listed_in.name == "rank-0.sha256" else [])
        if len(saved) == 5:
            os.truncate(folder / names[0], 1000)
            raise KeyboardInterrupt
        write_hashes(folder, listed_in, names)

    monkeypatch.setattr(checkpoint_storage, "write_hashes", killed_at_step_5)
    with pytest.raises(KeyboardInterrupt):
        pretrain.run(config)
    folder = Path(config.output_dir, "checkpoints")
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-00000003", "step-00000004"]
    monkeypatch.undo()
    pretrain.run(dataclasses.replace(config, resume=True))
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000004", "step-00000005"]
