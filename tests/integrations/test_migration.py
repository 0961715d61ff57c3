"""docs/migration.md: the two columns of its tables are equal. docs/integrations.md: TRL's example runs."""

from __future__ import annotations

import importlib
import re
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.loss import loss_utils

import fastalign
from fastalign.causal_lm import fuse_head
from fastalign.integrations import liger as for_liger
from fastalign.integrations import transformers as for_transformers
from tests.models.tiny_models import VOCAB, llama

DOCS = Path(__file__).parents[2] / "docs"
MOVING = (DOCS / "migration.md").read_text(encoding="utf-8")
CALL = r"`([^`]+)`(?:, after `([^`]+)`)?"


def calls(host: str) -> list[tuple[str, ...]]:
    """The rows of a host's table: their expression, its preparation, ours, its preparation."""
    table = re.search(rf"^\| {host} \| fastalign \|\n(?:\|.*\n)+", MOVING, re.MULTILINE)
    assert table is not None
    return re.findall(rf"^\| {CALL} \| {CALL} \|$", table[0], re.MULTILINE)


def names() -> dict[str, Any]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 8), 0.3 * torch.randn(VOCAB, 8)
    tokens = torch.randint(VOCAB, (2, 7))
    tensors: dict[str, Any] = {
        "h": hidden,
        "w": weight,
        "z": hidden @ weight.T,
        "ids": torch.randint(VOCAB, (6,)),
    }
    numbers = {"T": 0.7, "cap": 1.5, "V": VOCAB}
    labels = {"x": tokens, "y": tokens.where(tokens > 20, -100), "model": llama().float()}
    classes = {"b": torch.randn(VOCAB), "cw": torch.rand(VOCAB)}
    reference = {"ref": torch.randn(2, 7, 8), "rw": 0.3 * torch.randn(VOCAB, 8), "lp": -torch.rand(2, 7)}
    completions = {"rows": torch.randn(2, 7, 8), "good": torch.tensor([True, False]), "adv": torch.randn(2)}
    per_token: dict[str, Any] = dict(zip(("old", "a", "v", "v0", "r"), torch.randn(5, 2, 7), strict=True))
    per_token["old"] = reference["lp"] + 0.3 * per_token["old"]
    per_token |= {"m": labels["y"] >= 0, "tw": torch.rand(2, 7)}
    pairs = dict(zip(("pc", "pr", "rc", "rr"), -5 * torch.rand(4, 3), strict=True))
    tensors |= labels | classes | reference | completions | per_token | pairs
    return tensors | numbers | {"kl": torch.tensor(0.2)}


def value(expression: str, before: str, known: dict[str, Any]) -> tuple[Tensor, ...]:
    scope = names() | known
    if before:
        eval(before, scope)
    result = eval(expression, scope)
    return result if isinstance(result, tuple) else (result,)


OURS: dict[str, Any] = {
    **{name: getattr(fastalign, name) for name in fastalign.__all__},
    "loss_function": for_transformers.loss_function,
    "fuse_head": partial(fuse_head, verify=False),
}


def assert_equal_values(row: tuple[str, ...], host: dict[str, Any]) -> None:
    theirs, after_theirs, ours, after_ours = row
    torch.testing.assert_close(
        value(ours, after_ours, OURS), value(theirs, after_theirs, host), rtol=1e-5, atol=2e-6
    )


@pytest.mark.parametrize("row", calls("TRL"), ids=lambda row: row[0])
def test_a_call_of_trl_and_ours_give_the_same(row: tuple[str, ...]) -> None:
    pytest.importorskip("trl", reason="trl is not installed")
    import trl.trainer.utils as utils

    assert_equal_values(row, {"utils": utils, **vars(utils)})


@pytest.mark.parametrize("row", calls("transformers"), ids=lambda row: row[0])
def test_a_call_of_transformers_and_ours_give_the_same(row: tuple[str, ...]) -> None:
    assert_equal_values(row, vars(loss_utils))


@pytest.mark.parametrize("row", calls("Liger"), ids=lambda row: row[0])
def test_a_call_of_liger_and_ours_give_the_same(row: tuple[str, ...]) -> None:
    """Liger's chunked losses if it is installed. Its cross-entropy needs a GPU: ours under its name."""
    chunked = vars(importlib.import_module("liger_kernel.chunked_loss")) if find_spec("liger_kernel") else {}
    assert_equal_values(row, {**vars(for_liger), **chunked})


@pytest.mark.parametrize("row", calls("torch"), ids=lambda row: row[0])
def test_a_call_of_torch_and_ours_give_the_same(row: tuple[str, ...]) -> None:
    if row[0].startswith("linear_") and not hasattr(F, "linear_cross_entropy"):
        pytest.skip("F.linear_cross_entropy is in torch 2.13 and newer")
    assert_equal_values(row, vars(F))


class VerlConfig(SimpleNamespace):
    """What verl's policy loss reads of an ActorConfig, with its defaults."""

    clip_ratio, clip_ratio_low, clip_ratio_high = 0.2, 0.2, 0.2
    global_batch_info: dict[str, Any] = {}

    def get(self, name: str, default: Any) -> Any:
        return default


# Where the functions of a table's host lie. LLaMA-Factory's are in no release: formulas stand in for them.
MODULES = {
    "CCE": ("cut_cross_entropy",),
    "verl": (
        "verl.utils.experimental.torch_functional",
        "verl.utils.torch_functional",
        "verl.trainer.ppo.core_algos",
    ),
    "OpenRLHF": ("openrlhf.models.utils", "openrlhf.models.loss"),
    "LLaMA-Factory": ("tests.integrations.test_llamafactory",),
}


def functions_of(host: str) -> dict[str, Any] | None:
    """The host's names; None if it is not installed."""
    found: dict[str, Any] = {}
    for name in MODULES[host]:
        try:
            found |= vars(importlib.import_module(name))
        except ImportError:
            return None
    if host == "CCE":  # its other implementation needs a GPU
        found["linear_cross_entropy"] = partial(found["linear_cross_entropy"], impl="torch_compile")
    return found | {"config": VerlConfig()}


@pytest.mark.parametrize(
    ("host", "row"),
    [(host, row) for host in MODULES for row in calls(host)],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_call_of_a_peer_and_ours_give_the_same(host: str, row: tuple[str, ...]) -> None:
    functions = functions_of(host)
    if functions is None:  # ours alone
        assert all(x.isfinite().all() for x in value(row[2], row[3], OURS))
    else:
        assert_equal_values(row, functions)


def test_all_rows_are_read() -> None:
    rows = [line for line in MOVING.splitlines() if line.startswith("| `")]
    assert len(rows) == sum(len(calls(host)) for host in ("TRL", "transformers", "Liger", "torch", *MODULES))


def test_the_example_of_trl_counts_calls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from bench.experiments.trl_runs import TINY, dataset, model, tokenizer

    page = (DOCS / "integrations.md").read_text(encoding="utf-8")
    example = re.findall(r"## TRL.*?```py\n(.*?)```", page, re.DOTALL)[0]
    args = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=2, report_to="none", use_cpu=True, bf16=False, save_strategy="no"
    )
    given = {
        "model": model("SFT", TINY, {}),
        "dataset": dataset("SFT", 6),
        "tokenizer": tokenizer(TINY.vocab),
    }
    exec(example, given | {"SFTTrainer": trl.SFTTrainer, "args": args})
    assert capsys.readouterr().out.endswith("2\n")
