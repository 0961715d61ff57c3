"""The commands of README.md and docs/ run as printed, on small files of the names that they give.

No line is changed. Lines that install or build (pip, make) would change this environment or take minutes, so
the test only checks that what they name exists. The words of torchrun are read by torchrun, and its ranks are
forked (tests/stages/ranks.py): tests/stages/test_training.py starts it.
"""

import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import run as torchrun
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastalign import cli
from fastalign.stages.stage_configs import CONFIGS
from tests.stages.ranks import run_two_ranks
from tests.stages.tiny import CHAT, save_base, save_tokenizer, sentence, write

ROOT = Path(__file__).parents[2]
README, TRAINING = ROOT / "README.md", ROOT / "docs" / "training.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
PROGRAMS = ("fastalign", "torchrun", "pip", "make")


def blocks(page: Path, language: str) -> list[str]:
    return [text for found, text in BLOCK.findall(page.read_text(encoding="utf-8")) if found == language]


def commands(page: Path) -> list[list[str]]:
    """The words of each line of the blocks of commands, comments left out."""
    lines = [line for text in blocks(page, "") for line in text.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.partition(" ")[0] in PROGRAMS]


def write_data(folder: Path) -> None:
    """The files of docs/training.md's block of rows, its row first; sft.yaml, and a model to begin with."""
    (rows,) = blocks(TRAINING, "jsonl")
    first = {name: json.loads(row) for name, row in (line.split(maxsplit=1) for line in rows.splitlines())}
    answers = [" " + sentence(n + 50) for n in range(12)]
    more: Mapping[str, list[dict[str, Any]]] = {
        "text.jsonl": [{"text": " ".join(sentence(n + k) for k in range(9)) + "."} for n in range(40)],
        "chats.jsonl": [
            {
                "messages": [
                    {"role": "user", "content": sentence(n)},
                    {"role": "assistant", "content": answers[n]},
                ]
            }
            for n in range(12)
        ],
        "pairs.jsonl": [
            {"prompt": sentence(n), "chosen": " good" + answers[n], "rejected": " dull" + answers[-n]}
            for n in range(1, 12)
        ],
        "judged.jsonl": [
            {"prompt": sentence(n), "completion": answers[n], "label": n % 2 == 0} for n in range(12)
        ],
        "prompts.jsonl": [{"prompt": sentence(n)} for n in range(12)],
    }
    assert first.keys() == more.keys() and all(
        first[name].keys() == rows[0].keys() for name, rows in more.items()
    )
    for name, made in more.items():
        write(folder / name, [first[name], *made])
    (folder / "sft.yaml").write_text(
        "model: runs/base/model\ntrain_data: chats.jsonl\n"
        "output_dir: runs/sft-2\nbatch_size: 8\ndevice: cpu\n"
    )
    save_base(folder / "my-model", save_tokenizer(folder / "my-tokenizer", chat_template=CHAT), length=300)


def run(words: list[str]) -> None:
    if words[0] == "fastalign":
        cli.main(words[1:])
    elif words[0] == "torchrun":
        arguments = torchrun.parse_args(["--standalone", *words[1:]])
        assert arguments.module and arguments.nproc_per_node == "2"
        run_two_ranks(Path.cwd(), arguments.training_script, *arguments.training_script_args)
    elif words[0] == "make":
        subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    else:
        check_install(words)


def check_install(words: list[str]) -> None:
    """A line of pip must name versions and extras that exist."""
    assert words[:2] == ["pip", "install"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words[2:]:
        if word.startswith("."):
            extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", word)
            assert (
                extras is not None
                and set(filter(None, (extras[1] or "").split(","))) <= project["optional-dependencies"].keys()
            )
        elif not word.startswith("--"):
            assert word in (ROOT / "Makefile").read_text(), f"{word} is not what make installs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_runs_as_printed(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    for words in commands(page):
        run(words)
    if page == README:
        assert Path("runs/dpo/model").is_dir()
    if page != TRAINING:
        return
    for name in ("base", "sft", "reward", "dpo", "kto", "ppo", "sft-2"):
        assert Path("runs", name, "model").is_dir() and Path("runs", name, "metrics.jsonl").read_text()
    merged = AutoModelForCausalLM.from_pretrained("runs/dpo-merged")
    assert sum(weight.numel() for weight in merged.parameters()) < 20e6  # with gradients and moments 0.3 GiB
    assert AutoTokenizer.from_pretrained("runs/dpo-merged").chat_template


def test_the_pages_show_commands_of_every_kind() -> None:
    assert {words[0] for words in commands(README)} == {"fastalign", "pip", "make"}
    stages = {words[1] for words in commands(TRAINING) if words[0] == "fastalign"}
    assert stages == {*CONFIGS} and any(words[0] == "torchrun" for words in commands(TRAINING))


def test_readme_snippets_run(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", save_tokenizer(tmp_path / "tokenizer"), length=300)
    model = AutoModelForCausalLM.from_pretrained(base)
    tokens, vocab, width = 6, 40, 8
    torch.manual_seed(0)
    hidden, reference = (torch.randn(2, tokens, width, requires_grad=True) for _ in range(2))
    ids = torch.randint(vocab, (2, tokens))
    names: dict[str, Any] = {
        "hidden": hidden,
        "h": reference,
        "w": torch.randn(vocab, width),
        "lm_head": torch.nn.Linear(width, vocab),
    }
    names |= {
        "ids": ids,
        "targets": ids,
        "labels": ids,
        "logits": torch.randn(2, tokens, vocab, requires_grad=True) * 1,
    }
    names |= {
        "mask": torch.ones(2, tokens, dtype=torch.bool),
        "old_logp": torch.zeros(2, tokens),
        "advantages": torch.ones(2, tokens),
    }
    names |= {"name": base, "AutoModelForCausalLM": AutoModelForCausalLM, "eos": 0, "pad": 1, "model": model}
    for code in blocks(README, "python"):
        exec(compile(code, "README.md", "exec"), names)
