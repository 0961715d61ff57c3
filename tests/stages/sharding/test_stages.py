"""Every stage on gloo ranks that share a model (FSDP2) takes the steps of one process."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fastalign.stages.config import save_config
from tests.stages.ranks import Job, Ranks
from tests.stages.sharding.cases import BF16, CASES, EXACT, STAGES, TP_CASES, configure, make_files
from tests.stages.tiny import lines

Runs = Mapping[str, tuple[Any, Any]]


def run_all(folder: Path, ranks: int) -> Runs:
    """The configurations of each case, run on one process and on ranks of which two share a model."""
    files = make_files(folder)
    configs, jobs = {}, list[Job]()
    cases = {**CASES, **TP_CASES, "bf16": BF16}
    for number, (name, case) in enumerate(cases.items()):
        # The same micro-batches, because Llama's norms in fp32 round rows of other micro-batches differently.
        micro = {"micro_batch_size": 1} if ranks == 4 else {}
        alone = configure(case, files, folder / f"alone{number}", **micro)
        options = {**case.layout(ranks), **micro, **case.sharded}
        sharded = configure(case, files, folder / f"sharded{number}", **options)
        save_config(sharded, folder / f"{number}.yaml")
        jobs.append((f"fastalign.stages.{case.stage}", ["--config", str(folder / f"{number}.yaml")]))
        configs[name] = alone, sharded
    started = Ranks(folder, ranks, jobs)
    try:
        for name, (alone, _) in configs.items():
            STAGES[cases[name].stage][0].run(alone)
    finally:
        started.join()
    return configs


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return run_all(tmp_path_factory.mktemp("sharding"), 2)


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return run_all(tmp_path_factory.mktemp("sharding"), 4)


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", [*CASES, *TP_CASES])
def test_two_ranks_that_share_a_model_equal_one_process(two_ranks: Runs, name: str) -> None:
    assert_equal_runs(*two_ranks[name])


@pytest.mark.cpu_only
def test_bf16_is_as_near_to_fp64_as_a_model_in_bf16_on_one_process(two_ranks: Runs) -> None:
    exact, (alone, sharded) = two_ranks[EXACT][0], two_ranks["bf16"]
    expected, *found = (
        torch.tensor([line["loss"] for line in lines(config)[1:]], dtype=torch.float64)
        for config in (exact, alone, sharded)
    )
    of_bf16, of_shards = ((losses - expected).abs().max() for losses in found)
    assert 0 < of_shards <= of_bf16 < 0.1


@pytest.mark.four_ranks
@pytest.mark.parametrize("name", [*CASES, *TP_CASES])
def test_two_groups_of_two_ranks_equal_one_process(four_ranks: Runs, name: str) -> None:
    """HSDP: a mesh (2, 2)."""
    assert_equal_runs(*four_ranks[name])


def assert_equal_runs(alone: Any, sharded: Any) -> None:
    """All saved weights and all metrics, to rounding in fp64."""
    folders = {path.parent.name for path in Path(alone.output_dir).glob("*/*.safetensors")}
    for folder in sorted(folders):
        expected, found = (saved(config, folder) for config in (alone, sharded))
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-12)
    assert len(lines(alone)) == len(lines(sharded)) > 5
    for one, other in zip(lines(alone), lines(sharded), strict=True):
        assert one.keys() == other.keys()
        for metric, value in one.items():
            # The language model's accuracy is a sum of shares in fp32.
            bound = 1e-7 if metric.endswith("accuracy") else 1e-12
            assert other[metric] == pytest.approx(value, rel=bound, abs=bound), metric


def saved(config: Any, folder: str) -> dict[str, torch.Tensor]:
    """All tensors of a saved model, by name and kind of file: a sharded model's are in several files."""
    files = Path(config.output_dir, folder).glob("*.safetensors")
    return {
        f"{re.sub('-.*-of-[0-9]*', '', file.name)} {name}": tensor
        for file in files
        for name, tensor in load_file(file).items()
    }


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", ["pretrain", "sft", "tp: pretrain"])
def test_each_rank_writes_about_half_of_the_model(two_ranks: Runs, name: str) -> None:
    alone, sharded = two_ranks[name]
    folder = Path(sharded.output_dir, "model")
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert {*files, "model.safetensors.index.json"} == {path.name for path in folder.glob("model*")}
    assert not [path for path in folder.iterdir() if path.is_dir()]
    sizes = [sum(tensor.nbytes for tensor in load_file(folder / file).values()) for file in files]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert min(sizes) > 0.3 * sum(sizes)
    for file in files:
        assert {part for part, of in index["weight_map"].items() if of == file} == load_file(
            folder / file
        ).keys()
    expected, found = (
        AutoModelForCausalLM.from_pretrained(Path(config.output_dir, "model"), dtype=torch.float64)
        for config in (alone, sharded)
    )
    for (key, weight), other in zip(expected.named_parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(other, weight, rtol=0, atol=1e-12, msg=key)
