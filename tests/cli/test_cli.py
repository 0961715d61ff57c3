"""The command line: configuration from files and arguments, help, refusals, and what `fastalign env` says."""

import dataclasses
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic.fields import FieldInfo

import fastalign
import fastalign_kernels.native
from fastalign import cli
from fastalign.stages import command, dpo, ppo, pretrain, sft
from fastalign.stages.config import TrainConfig, describe, parse, read_config, save_config
from fastalign.stages.stage_configs import CONFIGS

NEEDED = ["train_data=rows.jsonl", "output_dir=out", "model=somewhere"]


def refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(sft.SFTConfig, argv, prog="fastalign sft")
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, "one line"
    return said


def test_arguments_win_over_the_file_and_defaults_fill_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "learning_rate: 3e-4\nbatch_size: 64\nreport_to: [wandb]\nmax_grad_norm: null\nmodel: file\n"
    )
    argv = ["batch_size=8", "--config", str(file), *NEEDED, "bf16=true", "lora_targets=q_proj, v_proj"]
    config = parse(sft.SFTConfig, argv, prog="fastalign sft")
    expected = sft.SFTConfig(
        train_data="rows.jsonl",
        output_dir="out",
        model="somewhere",
        learning_rate=0.0003,
        batch_size=8,
        report_to=["wandb"],
        max_grad_norm=None,
        bf16=True,
        lora_targets=["q_proj", "v_proj"],
    )
    assert config == expected
    assert config.max_length == 1024 and config.eval_data is None


def test_mappings_lists_and_null_on_the_command_line_are_yaml() -> None:
    argv = [
        "train_data=1.jsonl",
        "output_dir=7",
        "tokenizer=t",
        "max_grad_norm=null",
        "report_to=[trackio, wandb]",
    ]
    argv.append("model_config={model_type: llama, hidden_size: 64, tie_word_embeddings: true}")
    config = parse(pretrain.PretrainConfig, argv, prog="fastalign pretrain")
    assert config.model_config == {"model_type": "llama", "hidden_size": 64, "tie_word_embeddings": True}
    assert (
        config.output_dir == "7" and config.max_grad_norm is None and config.report_to == ["trackio", "wandb"]
    )


def test_a_saved_configuration_reads_back_as_it_was(tmp_path: Path) -> None:
    config = sft.SFTConfig(
        train_data="x", output_dir="y", model="m", learning_rate=1e-7, report_to=["tensorboard"]
    )
    save_config(config, tmp_path / "config.yaml")
    assert sft.SFTConfig(**read_config(str(tmp_path / "config.yaml"))) == config
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    assert parse(sft.SFTConfig, ["--config", str(tmp_path / "config.json")], prog="fastalign sft") == config


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*NEEDED, "lerning_rate=1"], "got the unknown key 'lerning_rate', expected learning_rate"),
        ([*NEEDED, "zzz=1"], "got the unknown key 'zzz', expected one of adam_eps, async_checkpoints, "),
        ([*NEEDED, "sequence_length=8"], "got the unknown key 'sequence_length', expected max_length"),
        ([*NEEDED, "learning_rate=0"], "learning_rate: got '0', expected a number greater than 0"),
        ([*NEEDED, "batch_size=2.5"], "batch_size: got '2.5', expected a valid integer"),
        (
            [*NEEDED, "schedule=cosin"],
            "schedule: got 'cosin', expected 'constant', 'linear' or 'cosine'",
        ),
        ([*NEEDED, "report_to=wandb,foo"], "got 'foo', expected 'tensorboard', 'wandb' or 'trackio'"),
        ([*NEEDED, "max_steps=1", "epochs=1"], "max_steps: got 1 and epochs 1.0, expected one of the two"),
        ([*NEEDED, "report_to=[wandb"], "arguments: in '[wandb' got no YAML"),
        ([*NEEDED, "packing"], "got 'packing', expected key=value"),
        ([*NEEDED, "--packing"], "got '--packing', expected key=value, as in packing=…"),
        ([*NEEDED, "--batch_size", "4"], "got '--batch_size', expected key=value, as in batch_size=…"),
        ([*NEEDED, "lr=1"], "got the unknown key 'lr', expected learning_rate"),
        ([*NEEDED, "config=a.yaml"], "got the unknown key 'config', expected --config FILE"),
        (NEEDED[:2], "model: got no value, expected one"),
        ([*NEEDED, "eval_data="], "eval_data: got an empty text, expected a value"),
        ([*NEEDED, "output_dir="], "output_dir: got an empty text"),
        ([*NEEDED, "lora_targets="], "lora_targets: got an empty text"),
        (["--config", "a.yaml", "--config", "b.yaml"], "config: got a.yaml and b.yaml, expected one file"),
        (["--config", "nowhere.yaml"], "config: got 'nowhere.yaml', which is no file"),
    ],
)
def test_a_wrong_command_line_ends_with_a_line_that_names_it(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(argv, capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "got a list in"),
        ("a: [", "got no YAML"),
        ("1: 2", "got a dict in"),
        ("seed: 1\nseed: 2\n", "got the key 'seed' twice (line 2), expected it once"),
        ("model_config: {a: 1, a: 1}", "got the key 'a' twice (line 1)"),
        ('{"seed": 1, "seed": 2}', "got the key 'seed' twice"),
        ("seed: true", "seed: got True, expected a number"),
        ("max_grad_norm: false", "max_grad_norm: got False, expected a number"),
        ('{"seed": NaN}', "got NaN, expected a finite number or null"),
    ],
)
def test_a_file_that_holds_no_fields_or_one_twice_is_refused(
    tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"bad.{'json' if text.startswith('{') else 'yaml'}"
    path.write_text(text)
    assert message in refusal(["--config", str(path)], capsys)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{\n\t"output_dir": "1e-6", "model_config": {"rms_norm_eps": 1e-06}\n}'),
        ("a.yaml", "output_dir: '1e-6'\nmodel_config: {rms_norm_eps: 1e-06}\n"),
    ],
)
def test_a_number_with_an_exponent_is_one_at_any_depth(tmp_path: Path, name: str, text: str) -> None:
    """YAML 1.1 reads 1e-6 as a text, and tabs not at all."""
    (tmp_path / name).write_text("\ufeff" + text, encoding="utf-8")
    expected: dict[str, Any] = {"output_dir": "1e-6", "model_config": {"rms_norm_eps": 1e-6}}
    assert read_config(str(tmp_path / name)) == expected
    config = pretrain.PretrainConfig(**expected, train_data="x", tokenizer="t")
    save_config(config, tmp_path / "saved.yaml")
    assert pretrain.PretrainConfig(**read_config(str(tmp_path / "saved.yaml"))) == config


def test_no_reporter_is_asked_for_by_none() -> None:
    assert parse(sft.SFTConfig, [*NEEDED, "report_to=none"], prog="fastalign sft").report_to == []


def test_a_tilde_is_the_home_folder_in_every_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of YAML is expanded by no shell, and sh and zsh leave ~ in key=value as it is."""
    monkeypatch.setenv("HOME", "/home/me")
    shared = ("train_data", "eval_data", "output_dir", "tokenizer", "cache_dir", "model")
    for stage, places in ((dpo.DPOConfig, ("reference_dir",)), (ppo.PPOConfig, ("reward", "value_model"))):
        argv = [f"{place}=~/x" for place in (*shared, *places)]
        argv += ["reference=precomputed"] * (stage is dpo.DPOConfig)
        config = parse(stage, argv, prog="fastalign")
        assert {getattr(config, place) for place in (*shared, *places)} == {"/home/me/x"}


@pytest.mark.parametrize("stage", [pretrain.PretrainConfig, sft.SFTConfig])
def test_help_lists_every_field_with_type_default_and_description(stage: type[TrainConfig]) -> None:
    entries = re.findall(r"^  (\w+): (.+)\n((?:      .+(?:\n|$))+)", describe(stage), re.MULTILINE)
    assert [name for name, _, _ in entries] == [field.name for field in dataclasses.fields(stage)]
    heads = {name: head for name, head, _ in entries}
    assert heads["learning_rate"] == "float (> 0) = 2.0e-05"
    assert heads["max_steps"] == "int | None (> 0) = null"
    assert heads["train_data"] == "str (required)"
    assert heads["schedule"] == "Literal['constant', 'linear', 'cosine'] = cosine"
    assert heads["report_to"] == "list[Literal['tensorboard', 'wandb', 'trackio']] = []"
    assert not [
        text for text in heads.values() if "Annotated" in text or "typing" in text or "pydantic" in text
    ]


def test_every_field_is_described_in_the_source() -> None:
    for stage in (TrainConfig, pretrain.PretrainConfig, sft.SFTConfig):
        fields: dict[str, FieldInfo] = getattr(stage, "__pydantic_fields__")  # noqa: B009
        undescribed = [name for name in stage.__annotations__ if not fields[name].description]
        assert not undescribed, f"{stage.__name__} has fields without a docstring"


def test_a_stage_runs_from_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[TrainConfig] = []
    monkeypatch.setattr(command, "check_names", lambda config: None)
    monkeypatch.setattr(sft, "run", ran.append)
    cli.main(["sft", *NEEDED, "seed=3"])
    assert ran == [sft.SFTConfig(train_data="rows.jsonl", output_dir="out", model="somewhere", seed=3)]


def test_the_stage_help_comes_through_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["pretrain", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert (
        shown.startswith("usage: fastalign pretrain") and "\n  sequence_length: int (>= 2) = 1024\n" in shown
    )


def test_an_unknown_command_is_refused_with_those_that_are_close_or_else_all(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for wrong, hint in (("sfd", "sft"), ("zzz", f"one of {', '.join(cli.COMMANDS)}")):
        with pytest.raises(SystemExit) as stop:
            cli.main([wrong])
        assert stop.value.code == 2
        assert capsys.readouterr().err == f"fastalign: error: command: got {wrong!r}, expected {hint}\n"


def test_without_a_command_they_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main([])
    shown = capsys.readouterr().out
    assert all(f"\n  {name:<10} {line}\n" in shown for name, (_, line) in cli.COMMANDS.items())


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"fastalign {fastalign.__version__}\n"


def test_help_describes_the_demo_with_ppo() -> None:
    assert "KTO, PPO and GRPO" in cli.COMMANDS["demo"][1]


def test_env_says_what_is_native_and_what_falls_back_and_why(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [("csrc row kernels", "native: avx512", ""), ("triton row kernels", "reference", "no CUDA device")]
    monkeypatch.setattr(fastalign_kernels.native, "status", lambda: rows)
    cli.main(["env"])
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert shown["torch"] == torch.__version__
    assert {
        "fastalign",
        "triton",
        "transformers",
        "flash-attn",
        "liger-kernel",
        "python",
        "threads",
    } <= shown.keys()
    assert shown["csrc"].split(maxsplit=2)[2] == "native: avx512"
    assert shown["triton"] != "" and "reference (no CUDA device)" in cli.environment()


def loaded_by(argv: list[str], *packages: str) -> list[str]:
    """Which of the packages a command loads, in a process of its own."""
    code = f"""
import sys
from fastalign import cli
try: cli.main({argv})
except SystemExit: pass
print("loaded:", *(name for name in {packages} if name in sys.modules))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, env=environment, stdout=subprocess.PIPE, text=True
    )
    return done.stdout.splitlines()[-1].split()[1:]


def test_env_does_without_transformers() -> None:
    assert loaded_by(["env"], "torch", "transformers") == ["torch"]


@pytest.mark.parametrize("argv", [[], ["--help"], ["--version"], ["sfd"]])
def test_help_loads_next_to_nothing(argv: list[str]) -> None:
    # With torch it took 2.4 s; without these 0.12 s, and each of these alone takes longer.
    assert (
        loaded_by(argv, "torch", "transformers", "datasets", "pydantic", "yaml", "importlib.metadata") == []
    )


@pytest.mark.parametrize("stage", sorted(CONFIGS))
def test_a_stages_help_and_what_is_wrong_with_its_arguments_need_no_torch(stage: str) -> None:
    for argv in ([stage, "--help"], [stage, "zzz=1"]):
        assert loaded_by(argv, "torch", "transformers", "datasets") == []


def test_help_is_there_within_its_time() -> None:
    """In seconds of the processor: the clock also shows what else runs here. The least of three was 0.10 s
    and 0.65 s."""

    def seconds(*argv: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run(
            [sys.executable, "-m", "fastalign", *argv], check=True, env=environment, stdout=subprocess.DEVNULL
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds("--help") for _ in range(3)) < 0.3
    assert min(seconds("sft", "--help") for _ in range(3)) < 1


def test_without_torch_help_works_and_a_stage_says_in_one_line_what_is_missing(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["torch"] = None
from fastalign import cli
cli.main({argv})
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    for argv, status, shown in (
        (["--help"], 0, ""),
        (["sft", "--help"], 0, ""),
        (["env"], 2, "fastalign env: error: needs torch, which is not installed: pip install 'torch'\n"),
        (
            ["sft", *NEEDED[:2], f"model={tmp_path}"],
            2,
            "fastalign sft: error: needs torch, which is not installed: pip install 'torch'\n",
        ),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code.format(argv=argv)], env=environment, capture_output=True, text=True
        )
        assert done.returncode == status and done.stderr == shown


def test_python_dash_m_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastalign", "--help"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("usage: fastalign ") and "pretrain" in done.stdout


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    monkeypatch.delitem(sys.modules, "fastalign.demo.command", raising=False)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["demo", "--steps", "1"])
    assert stopped.value.code == 2
    assert (
        "fastalign demo: error: needs vaderSentiment, which is not installed: pip install 'fastalign[demo]'"
        in capsys.readouterr().err
    )
