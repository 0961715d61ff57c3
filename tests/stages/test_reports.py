"""What a run writes about each step, and to whom."""

import itertools
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from fastalign.stages import pretrain
from fastalign.stages.config import read_config
from fastalign.stages.runs import reporters
from tests.stages.tiny import lines


def test_every_step_has_a_line_that_says_what_happened(
    pretraining: Callable[..., pretrain.PretrainConfig],
) -> None:
    config = pretraining(max_steps=5, eval_every=2, batch_size=2)
    result = pretrain.run(config)
    found = lines(config)
    assert [line["step"] for line in found] == [0, 1, 2, 3, 4, 5]
    assert [line["step"] for line in found if "eval/nll" in line] == [0, 2, 4, 5]
    assert {"loss", "nll", "accuracy", "entropy", "grad_norm", "learning_rate", "tokens", "epoch"} <= found[
        1
    ].keys()
    assert all(one["tokens"] < two["tokens"] for one, two in itertools.pairwise(found[1:]))
    assert {name: result[name] for name in found[-1]} == found[-1] and set(result) - set(found[-1]) == {
        "seconds",
        "tokens_per_second",
    }
    assert pretrain.PretrainConfig(**read_config(str(Path(config.output_dir, "config.yaml")))) == config


def test_tensorboard_gets_the_curves(pretraining: Callable[..., pretrain.PretrainConfig]) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    config = pretraining(max_steps=3, report_to="tensorboard")
    pretrain.run(config)
    events = EventAccumulator(str(Path(config.output_dir, "tensorboard")))
    events.Reload()
    curve = [(event.step, event.value) for event in events.Scalars("loss")]
    expected = [(line["step"], line["loss"]) for line in lines(config)[1:]]
    assert curve == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in expected]  # events are fp32
    assert [event.step for event in events.Scalars("eval/nll")] == [0, 3]


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_hosted_reporters_get_every_line(
    pretraining: Callable[..., pretrain.PretrainConfig],
    package: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A package of that name whose three functions write down how they are called.
    source = """
        calls = []
        def init(**options): calls.append(("init", options))
        def log(metrics, step): calls.append(("log", step, metrics))
        def finish(): calls.append(("finish",))
    """
    (tmp_path / f"{package}.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, package, raising=False)
    config = pretraining(max_steps=2, report_to=[package], project="mine")
    pretrain.run(config)
    calls = sys.modules.pop(package).calls
    assert calls[0][0] == "init" and calls[0][1]["project"] == "mine"
    assert calls[0][1]["name"] == Path(config.output_dir).name and calls[0][1]["config"]["batch_size"] == 4
    assert [(kind, *rest[:1]) for kind, *rest in calls[1:]] == [
        ("log", 0),
        ("log", 1),
        ("log", 2),
        ("finish",),
    ]
    assert calls[2][2]["loss"] == lines(config)[1]["loss"]


def test_a_folder_that_has_a_reporters_name_is_not_that_reporter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trackio").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match="report_to: got trackio, expected installed packages"):
        reporters.check_reporters(["trackio"])
