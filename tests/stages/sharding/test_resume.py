"""A run that stops on some ranks goes on on others: with the same bits on the same layout, else equal to
rounding."""

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fastalign.stages.config import save_config
from tests.stages.ranks import Job, Ranks
from tests.stages.sharding.cases import CASES, STAGES, TP_CASES, configure, make_files
from tests.stages.sharding.test_stages import saved
from tests.stages.tiny import lines

STEPS = 4
KINDS = CASES | TP_CASES
DROPOUT = {"lora_rank": 4, "lora_dropout": 0.2}


class Chain(NamedTuple):
    """A run that is to equal another one, and the layouts on which it takes two steps each."""

    case: str
    layouts: tuple[Mapping[str, Any], ...]
    whole: Mapping[str, Any] = {}
    """The layout of the run that is not interrupted."""
    options: Mapping[str, Any] = {}


ALONE: Mapping[str, Any] = {"ranks": 1}
DDP: Mapping[str, Any] = {"ranks": 2}
FSDP: Mapping[str, Any] = {"ranks": 2, "dp_shard": 2}
PARALLEL: Mapping[str, Any] = {"ranks": 2, "tp": 2}
OFFLOADED: Mapping[str, Any] = {**FSDP, "cpu_offload": True, "async_checkpoints": True}
SAME = {
    "FSDP2, dropout": Chain("sft, LoRA, tied head too", (FSDP, FSDP), FSDP, DROPOUT),
    "FSDP2, offloaded, asynchronous": Chain("sft, untied, offloaded", (OFFLOADED, OFFLOADED), OFFLOADED),
    "tp, dropout": Chain("tp: sft", (PARALLEL, PARALLEL), PARALLEL, DROPOUT),
}
OTHER = {
    "FSDP2 to one process": Chain("sft", (FSDP, ALONE)),
    "DDP to FSDP2": Chain("sft", (DDP, FSDP)),
    "tp to FSDP2": Chain("tp: sft", (PARALLEL, FSDP)),
    "PPO, FSDP2 to one process": Chain("ppo", (FSDP, ALONE)),
}


class Runs:
    """The runs of chains in a folder: `begin` and `go_on` list them by rank count, `run` runs them."""

    def __init__(self, folder: Path, chains: Mapping[str, Chain], ranks: int) -> None:
        self.folder, self.chains, self.ranks = folder, chains, ranks
        self.files = make_files(folder)
        self.configs: dict[str, tuple[Any, Any]] = {}

    def configure(self, name: str, layout: Mapping[str, Any], kind: str, **more: Any) -> Any:
        chain = self.chains[name]
        fields = {field: value for field, value in layout.items() if field != "ranks"}
        number = list(self.chains).index(name)
        options = {"schedule": "constant", "eval_every": 2, **chain.options, **fields, **more}
        return configure(KINDS[chain.case], self.files, self.folder / f"{kind}{number}", **options)

    def run(self) -> None:
        """Each chain's whole run, and its parts one after the other; those on ranks all at once."""
        longest = max(len(chain.layouts) for chain in self.chains.values())
        whole = [
            (
                self.configure(name, chain.whole or ALONE, "whole", max_steps=STEPS),
                chain.whole or ALONE,
                chain,
            )
            for name, chain in self.chains.items()
        ]
        self.run_part(whole)
        for part in range(longest):
            self.run_part(
                [
                    (self.part_of(name, part), chain.layouts[part], chain)
                    for name, chain in self.chains.items()
                ]
            )
        for name, (config, _, _) in zip(self.chains, whole, strict=True):
            self.configs[name] = config, self.part_of(name, longest - 1)

    def part_of(self, name: str, part: int) -> Any:
        layouts = self.chains[name].layouts
        end = STEPS * (part + 1) // len(layouts)
        saves = {"save_every": end if part == 0 else STEPS, "resume": part > 0}
        return self.configure(name, layouts[part], "parts", max_steps=end, **saves)

    def run_part(self, runs: list[tuple[Any, Mapping[str, Any], Chain]]) -> None:
        jobs = list[Job]()
        for number, (config, layout, chain) in enumerate(runs):
            stage = KINDS[chain.case].stage
            if layout["ranks"] == 1:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr("warnings.warn", lambda *arguments, **options: None)
                    STAGES[stage][0].run(config)
            else:
                path = self.folder / f"job{number}.yaml"
                save_config(config, path)
                jobs.append((f"fastalign.stages.{stage}", ["--config", str(path)]))
        if jobs:
            (ranks,) = {layout["ranks"] for _, layout, _ in runs if layout["ranks"] > 1}
            logs = Path(tempfile.mkdtemp(dir=self.folder))
            Ranks(logs, ranks, jobs).join()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[Any, Any]]:
    made = Runs(tmp_path_factory.mktemp("resume"), SAME | OTHER, 2)
    made.run()
    return made.configs


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", SAME)
def test_on_the_same_layout_a_resumed_run_has_the_same_bits(
    runs: Mapping[str, tuple[Any, Any]], name: str
) -> None:
    whole, resumed = runs[name]
    expected, found = saved(whole, "model"), saved(resumed, "model")
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    assert lines(whole) == lines(resumed)


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", OTHER)
def test_on_another_layout_a_resumed_run_is_equal_to_rounding(
    runs: Mapping[str, tuple[Any, Any]], name: str
) -> None:
    assert_equal_to_rounding(*runs[name], parts=("model", "value") if "PPO" in name else ("model",))


def assert_equal_to_rounding(whole: Any, resumed: Any, parts: tuple[str, ...] = ("model",)) -> None:
    for folder in parts:
        expected, found = saved(whole, folder), saved(resumed, folder)
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-12)
    assert [line["step"] for line in lines(whole)] == [line["step"] for line in lines(resumed)]


# What a run resumes on: four ranks, two ranks and one process, with two steps on each.
FOUR: Mapping[str, Any] = {
    "ppo": ({"dp_shard": 2}, {"dp_shard": 2}, "dp_shard 2"),
    "tp: sft": ({"dp_shard": 2, "tp": 2}, {"tp": 2}, "tp 2"),
}


@pytest.mark.four_ranks
@pytest.mark.parametrize("name", FOUR)
def test_a_run_goes_from_four_ranks_to_two_and_to_one(tmp_path: Path, name: str) -> None:
    """HSDP (2, 2), then FSDP2 on two ranks, then one process; and tp with FSDP2, then tp."""
    files, case = make_files(tmp_path), KINDS[name]
    *layouts, described = FOUR[name]
    stage = STAGES[case.stage][0]
    fixed: dict[str, Any] = {"schedule": "constant", "micro_batch_size": 1, "save_every": 2}
    whole = configure(case, files, tmp_path / "whole", **fixed, max_steps=6)
    stage.run(whole)
    parts = configure(case, files, tmp_path / "parts", **fixed, max_steps=2)
    for ranks, layout in zip((4, 2), layouts, strict=True):
        parts = dataclasses.replace(parts, **{"dp_shard": 1, "tp": 1, **layout})
        save_config(parts, tmp_path / "parts.yaml")
        logs = tmp_path / f"ranks{ranks}"
        logs.mkdir()
        job = (f"fastalign.stages.{case.stage}", ["--config", str(tmp_path / "parts.yaml")])
        Ranks(logs, ranks, [job]).join(300)
        parts = dataclasses.replace(parts, resume=True, max_steps=parts.max_steps + 2)
    parts = dataclasses.replace(parts, dp_shard=1, tp=1)
    with pytest.warns(UserWarning, match=rf"on 1 processes a run of 2 processes \({described}\)"):
        stage.run(parts)
    assert_equal_to_rounding(whole, parts, parts=("model", "value") if name == "ppo" else ("model",))
