"""What is missing in a model's folder is told before data is read."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastalign.stages import sft
from fastalign.stages.models import hub_names
from fastalign.stages.models.hub_names import check_name, check_names

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of two files of weights and their index, with a tokenizer."""
    hub_names.check_name.cache_clear()
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for name in names:
        save_file({name: torch.zeros(3)}, tmp_path / name)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {name: name for name in names}}))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def cut(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def point(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def config(folder: Path) -> sft.SFTConfig:
    return sft.SFTConfig(model=str(folder), train_data="no.jsonl", output_dir="out")


def test_a_whole_folder_passes(folder: Path) -> None:
    check_names(config(folder))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            remove("model-00002-of-00002.safetensors"),
            f"without model-00002-of.*the 2 files that {INDEX} lists",
        ),
        (remove(INDEX), f"with model-00001-of-.* and without {INDEX}, expected both"),
        (remove("tokenizer.json"), "without a tokenizer, expected one there"),
        (
            cut,
            r"model-00002-of-.*, which is of \d+ bytes, not of the \d+ that its header says, expected",
        ),
        (point, "model-00002-of-.*, which is a pointer of Git LFS"),
    ],
    ids=["file", "index", "tokenizer", "cut", "lfs"],
)
def test_what_is_missing_or_cut_off_is_named(
    folder: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=f"^model: got .*{message}"):
        check_names(config(folder))


def test_a_tokenizers_folder_without_one_is_named(tmp_path: Path) -> None:
    hub_names.check_name.cache_clear()
    with pytest.raises(ValueError, match="^tokenizer: got folder .* without a tokenizer"):
        check_name("tokenizer", str(tmp_path))
