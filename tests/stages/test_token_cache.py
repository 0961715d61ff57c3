"""Rows are tokenized once: by one rank for all, and once for runs that share a cache. Rows that ranks drew go
only to the ranks that need them. Run as a module, this is a rank."""

import dataclasses
import datetime
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastalign.data import tokenization
from fastalign.data.preference_pairs import tokenize_pairs, tokenize_unpaired
from fastalign.data.readers import load_rows
from fastalign.data.tokenization import tokenize_prompts
from fastalign.stages import sft
from fastalign.stages.config import TrainConfig
from fastalign.stages.models.loading import load_tokenizer
from fastalign.stages.policy.shared_rows import SharedRows
from fastalign.stages.runs import checkpoint
from fastalign.stages.runs.distributed import World, join_world
from fastalign.stages.sft import pack_answers
from fastalign.stages.stage_rows import read_rows
from fastalign.stages.token_cache import CachedRows, TokenCache, key_of, write_rows
from tests.stages.ranks import run_two_ranks
from tests.stages.tiny import lines, save_tokenizer, sentence, weights, write

Tuning = Callable[..., sft.SFTConfig]
ALONE = World(0, 1, torch.device("cpu"))


def count_texts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of texts that the tokenizer is given from now on."""
    counted: list[int] = []
    encode = tokenization._encode

    def counting(tokenizer: Any, texts: list[str], **options: Any) -> Any:
        counted.append(len(texts))
        return encode(tokenizer, texts, **options)

    monkeypatch.setattr(tokenization, "_encode", counting)
    return counted


def test_a_second_run_with_the_same_rows_tokenizes_none_and_trains_the_same(
    tuning: Tuning, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"eval_data": files["pairs"], "max_steps": 2}
    plain = tuning(**options)
    sft.run(plain)
    counted = count_texts(monkeypatch)
    first, second = (tuning(**options, cache_dir=str(tmp_path / "cache")) for _ in range(2))
    sft.run(first)
    assert sum(counted) == 24, "eval_data is train_data, so it is read from the cache"
    sft.run(second)
    assert sum(counted) == 24
    for cached in (first, second):
        assert lines(cached) == lines(plain)
        assert all(torch.equal(tensor, weights(cached)[name]) for name, tensor in weights(plain).items())


@pytest.mark.parametrize(
    "changes", [{"max_length": 48}, {"too_long": "truncate"}, {"packing": True}, {"train_data": "other"}]
)
def test_other_rows_or_options_are_tokenized_anew(
    tuning: Tuning,
    files: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
) -> None:
    cache: dict[str, Any] = {"cache_dir": str(tmp_path / "cache")}
    tokenizer = load_tokenizer(tuning().model)

    def read(config: sft.SFTConfig) -> Any:
        options = {name: getattr(config, name) for name in ("max_length", "too_long", "packing")}
        return read_rows(config, ALONE, tokenizer, partial(pack_answers, tokenizer=tokenizer, **options))

    read(tuning(**cache))
    counted = count_texts(monkeypatch)
    if "train_data" in changes:
        rows = [json.loads(row) for row in Path(files["pairs"]).read_text().splitlines()]
        changes = {"train_data": write(tmp_path / "other.jsonl", [*rows[:-1], rows[0]])}
    changed = tuning(**cache, **changes)
    found = read(changed)
    assert sum(counted) == 24
    monkeypatch.undo()
    assert [*found.train] == read(dataclasses.replace(changed, cache_dir=None)).train


def test_the_tokenizer_and_its_template_are_in_the_hash(tmp_path: Path, files: dict[str, str]) -> None:
    rows = load_rows(files["pairs"])
    plain = load_tokenizer(files["tokenizer"])
    chatty = load_tokenizer(save_tokenizer(tmp_path / "chatty", chat_template="{{ messages }}"))
    special = load_tokenizer(save_tokenizer(tmp_path / "special", special=("<eos>", "<pad>", "<s>")))
    same = load_tokenizer(save_tokenizer(tmp_path / "same"))
    keys = [key_of(rows, each, partial(pack_answers)) for each in (plain, chatty, special, same)]
    assert len(set(keys[:3])) == 3 and keys[3] == keys[0]
    assert key_of(rows, plain, partial(tokenize_pairs)) != keys[0]


def test_the_source_of_the_tokenization_is_in_the_hash(tmp_path: Path, files: dict[str, str]) -> None:
    rows, tokenizer = load_rows(files["pairs"]), load_tokenizer(files["tokenizer"])
    keys = []
    for number, body in enumerate(("return []", "return [[]]", "return []")):
        path = tmp_path / f"{number}.py"
        path.write_text(f"def tokenize(loaded):\n    {body}\n")
        spec = importlib.util.spec_from_file_location("same_name", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        keys.append(key_of(rows, tokenizer, partial(module.tokenize)))
    assert keys[0] != keys[1] and keys[0] == keys[2]


@pytest.mark.parametrize("name", ["tokens.npy", "trained.npy", "meta.json", "manifest.sha256"])
def test_a_damaged_folder_is_named_and_written_again(
    tuning: Tuning,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    config = tuning(cache_dir=str(tmp_path / "cache"))
    tokenizer = load_tokenizer(config.model)
    tokenize = partial(pack_answers, tokenizer=tokenizer, max_length=64, too_long="drop", packing=True)
    expected = [*read_rows(config, ALONE, tokenizer, tokenize).train]
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 4
    (folder / name).write_bytes(content)
    counted = count_texts(monkeypatch)
    assert [*read_rows(config, ALONE, tokenizer, tokenize).train] == expected
    assert sum(counted) == 24
    said = capsys.readouterr().out
    assert f"cache_dir: {folder} is damaged (" in said and "and written again" in said
    assert [*read_rows(config, ALONE, tokenizer, tokenize).train] == expected
    assert sum(counted) == 24


def test_rows_of_each_kind_come_back_as_they_were(tmp_path: Path, files: dict[str, str]) -> None:
    tokenizer = load_tokenizer(files["tokenizer"])
    pairs = [
        {"prompt": sentence(n), "chosen": " good", "rejected": " bad", "margin": n / 3} for n in range(5)
    ]
    judged = [{"prompt": sentence(n), "completion": " good", "label": n % 2 == 0} for n in range(5)]
    prompts = [{"prompt": sentence(n), "answer": {"is": [n, None, "é"]}} for n in range(5)]
    kinds: list[tuple[list[Any], Callable[..., list[Any]]]]
    kinds = [(pairs, tokenize_pairs), (judged, tokenize_unpaired), (prompts, tokenize_prompts)]
    for number, (rows, tokenize) in enumerate(kinds):
        loaded = load_rows(write(tmp_path / f"{number}.jsonl", rows))
        tokenized = tokenize(loaded, tokenizer, max_length=64)
        folder = tmp_path / str(number)
        folder.mkdir()
        write_rows(folder, tokenized, {})
        found: CachedRows[Any] = CachedRows(folder)
        assert [*found] == tokenized and found[1:3] == tokenized[1:3] and found[-1] == tokenized[-1]
        assert repr([*found]) == repr(tokenized), "tokens are ints and flags bools, not NumPy's"
        assert isinstance(found._tokens, np.memmap)
        with pytest.raises(IndexError):
            found[5]


def test_rows_that_json_would_change_are_not_cached_which_is_said(
    tmp_path: Path, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    day = datetime.date(2026, 11, 27)
    pq.write_table(pa.table({"prompt": [sentence(1)], "day": [day]}), tmp_path / "prompts.parquet")
    tokenizer = load_tokenizer(files["tokenizer"])
    config = TrainConfig(
        train_data=str(tmp_path / "prompts.parquet"), output_dir="x", cache_dir=str(tmp_path / "cache")
    )
    rows = read_rows(config, ALONE, tokenizer, partial(tokenize_prompts, tokenizer=tokenizer, max_length=64))
    assert rows.train[0].row["day"] == day
    said = capsys.readouterr().out
    assert "prompts.parquet is tokenized by each process, because its row 1 holds what JSON cannot" in said


def test_warnings_of_a_tokenization_are_given_again_by_the_cache(
    tmp_path: Path, files: dict[str, str]
) -> None:
    rows = [{"prompt": "film", "completion": " film" * size} for size in (2, 80)]
    tokenizer = load_tokenizer(files["tokenizer"])
    config = TrainConfig(
        train_data=write(tmp_path / "rows.jsonl", rows), output_dir="x", cache_dir=str(tmp_path / "cache")
    )
    cache = TokenCache(config, ALONE, tokenizer)
    tokenize = partial(pack_answers, tokenizer=tokenizer, max_length=16, too_long="drop", packing=False)
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = cache.read(config.train_data, "train", tokenize, lambda loaded: [])
        assert len(found.rows) == 1
        assert [str(w.message) for w in caught if "longer than max_length=16" in str(w.message)]


# Two ranks


def share_rows(world: World) -> None:
    """Five rows, of which rank 0 draws two: each rank gets those that it needs, and no other."""
    local = [["row", number] for number in ((0, 1), (2, 3, 4))[world.rank]]
    rows = SharedRows(world, local, 5)
    assert len(rows) == 5 and [*rows.held.values()] == local
    rows.fetch([[3, 0, 3], [2, 4]])
    assert sorted(rows.held) == ([0, 1, 3], [2, 3, 4])[world.rank]
    assert all(rows[number] == ["row", number] for number in rows.held)
    with pytest.raises(LookupError, match=r"row 2: got one that rank 1 drew|row 1: got one that rank 0 drew"):
        rows[(2, 1)[world.rank]]
    rows.fetch([[], []])
    rows.fetch([[], [0]])
    assert (0 in rows.held) and len(rows.held) == (3, 4)[world.rank]


def run_rank(folder: Path) -> None:
    """Read rows twice; a file of this rank's counts the texts that it tokenized."""
    with pytest.MonkeyPatch.context() as patch, join_world("cpu") as world:
        share_rows(world)
        counted = count_texts(patch)
        config = TrainConfig(train_data=str(folder / "rows.jsonl"), output_dir=str(folder / "run"))
        tokenizer = load_tokenizer(str(folder / "tokenizer"))
        tokenize = partial(pack_answers, tokenizer=tokenizer, max_length=64, too_long="drop", packing=True)
        for _ in range(2):
            found = read_rows(config, world, tokenizer, tokenize)
            assert isinstance(found.train, CachedRows)
        loaded = load_rows(config.train_data)
        assert checkpoint.fingerprint_of(config.train_data, split="train") == loaded.fingerprint
        (folder / f"rank{world.rank}.json").write_text(json.dumps([sum(counted), [*found.train]]))


def test_rank_0_tokenizes_once_and_rank_1_reads(tmp_path: Path, files: dict[str, str]) -> None:
    (tmp_path / "rows.jsonl").write_text(Path(files["pairs"]).read_text())
    save_tokenizer(tmp_path / "tokenizer")
    run_two_ranks(tmp_path, "tests.stages.test_token_cache", str(tmp_path))
    (texts_0, rows_0), (texts_1, rows_1) = (
        json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)
    )
    assert (texts_0, texts_1) == (24, 0)
    assert rows_0 == rows_1


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
