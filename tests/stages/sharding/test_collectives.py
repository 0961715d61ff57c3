"""What ranks of a sharded model send each other, as stages/models/sharding.py says."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from fastalign_kernels import plan_head
from tests.linear.screen_inputs import needs_screen
from tests.stages.ranks import Ranks
from tests.stages.sharding.collectives import GATHER, HIDDEN, LAYERS, REDUCE, TOKENS, VOCAB

pytestmark = pytest.mark.cpu_only
EMBEDDING, HEAD, NORM = 1, 1, 1
TABLE = VOCAB * HIDDEN // 2  # a rank's part of the embedding or of the head


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("collectives")
    job = ("tests.stages.sharding.collectives", [str(folder / "counted.json")])
    Ranks(folder, 2, [job]).join()
    result: dict[str, Any] = json.loads(Path(folder, "counted.json").read_text())
    return result


def names(calls: list[list[Any]]) -> Counter[str]:
    return Counter(name for name, _, _ in calls)


def test_the_head_is_gathered_once_a_micro_batch_in_any_number_of_chunks(counted: dict[str, Any]) -> None:
    chunk = plan_head(TOKENS, HIDDEN, VOCAB, dtype=torch.float32, workspace_mib=0.01).chunk
    assert chunk < TOKENS / 10, "many chunks"
    assert counted["many chunks"] == counted["untied"]
    tables = [call for call in counted["many chunks"]["first"] if call[2] == TABLE]
    assert [name for name, _, _ in tables] == [GATHER, GATHER], "the embedding and the head, once each"


def test_a_micro_batch_gathers_layers_twice_and_the_rest_once(counted: dict[str, Any]) -> None:
    gathers = 2 * LAYERS + EMBEDDING + HEAD + NORM
    assert names(counted["untied"]["first"]) == {GATHER: gathers}
    assert names(counted["untied"]["last"]) == {GATHER: gathers, REDUCE: LAYERS + EMBEDDING + HEAD + NORM}


def test_a_tied_embedding_is_gathered_once_with_the_last_norm(counted: dict[str, Any]) -> None:
    assert names(counted["tied"]["last"]) == {GATHER: 2 * LAYERS + 1, REDUCE: LAYERS + 1}


def test_a_model_is_made_whole_once_for_many_forward_passes(counted: dict[str, Any]) -> None:
    assert names(counted["untied"]["whole"]) == {GATHER: LAYERS + EMBEDDING + HEAD + NORM}


def test_bf16_gathers_in_bf16_and_reduces_in_fp32(counted: dict[str, Any]) -> None:
    dtypes = {(name, dtype) for name, dtype, _ in counted["bf16"]["last"]}
    assert dtypes == {(GATHER, "torch.bfloat16"), (REDUCE, "torch.float32")}
    assert counted["bf16"]["dtypes"] == ["torch.float32"]


@needs_screen
def test_a_gathered_weight_is_coded_as_it_is_in_each_step(counted: dict[str, Any]) -> None:
    """FSDP2 gathers it into the same memory and keeps its version."""
    (first, _), *later = counted["screened"]
    assert 0 < first < 1e-3
    assert all(error < 1e-3 and change > 0.01 for error, change in later)
