"""Every stage on gloo ranks that share a model (FSDP2) takes the steps of one process."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

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
    files = Path(config.output_dir, folder).glob("*.safetensors")
    return {f"{file.name} {name}": tensor for file in files for name, tensor in load_file(file).items()}
