"""Learning rates and epochs: every step is taken with the rate that its line says."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastalign.stages import batches, loop, optimization, pretrain
from fastalign.stages.config import TrainConfig
from fastalign.stages.runs.distributed import World
from tests.stages.tiny import lines

# Schedules


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", {0: 0.25, 3: 1.0, 4: 1.0, 104: 1.0}),
        ("linear", {0: 0.25, 3: 1.0, 4: 1.0, 54: 0.55, 104: 0.1}),
        ("cosine", {0: 0.25, 3: 1.0, 4: 1.0, 54: 0.55, 29: 0.1 + 0.9 * (1 + 0.5**0.5) / 2, 104: 0.1}),
    ],
)
def test_schedules_at_their_corners(schedule: str, expected: dict[int, float]) -> None:
    found = {
        s: optimization.multiplier(s, schedule=schedule, steps=104, warmup_steps=4, final_fraction=0.1)
        for s in expected
    }
    assert found == pytest.approx(expected)


def test_a_schedule_without_warm_up_starts_at_the_peak_and_takes_no_step_at_zero() -> None:
    options: dict[str, Any] = {"steps": 3, "warmup_steps": 0, "final_fraction": 0.0}
    rates = [optimization.multiplier(step, schedule="linear", **options) for step in range(3)]
    assert rates == pytest.approx([1, 2 / 3, 1 / 3])
    assert optimization.multiplier(2, schedule="linear", steps=3, warmup_steps=3, final_fraction=0.0) == 1.0


@pytest.mark.parametrize(
    ("dtype", "rate", "told"), [("bfloat16", 1e-6, 1), ("bfloat16", 1e-3, 0), ("float32", 1e-6, 0)]
)
def test_steps_that_round_to_nothing_are_told(
    dtype: str, rate: float, told: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """With DPO's default rate of 1e-6, six steps in bfloat16 left 98.6 % of the weights as they were."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter((0.02 * torch.randn(64, 64)).to(getattr(torch, dtype)))
    before, optimizer = weight.detach().clone(), torch.optim.AdamW([weight], lr=rate)
    assert optimization.peak_rates(World(0, 1, torch.device("cpu")), optimizer) == [rate]
    said = capsys.readouterr().out
    assert said.count("warning: dtype: got bfloat16 with learning_rate=1e-06, expected float32") == told
    weight.grad = torch.randn(64, 64).to(weight.dtype)
    optimizer.step()
    unchanged = (weight == before).float().mean().item()
    assert (unchanged > 0.5) == bool(told)
    if told:
        assert int(said.split("%")[0].split()[-1]) == pytest.approx(100 * unchanged, abs=2)


def test_the_learning_rate_of_each_step_is_the_schedules(
    pretraining: Callable[..., pretrain.PretrainConfig],
) -> None:
    config = pretraining(max_steps=4, schedule="linear", warmup_steps=2, final_fraction=0.5, eval_data=None)
    pretrain.run(config)
    assert [line["learning_rate"] for line in lines(config)] == pytest.approx([5e-3, 1e-2, 1e-2, 7.5e-3])


def test_a_warm_up_of_more_steps_than_the_run_is_refused_before_a_model_loads(
    pretraining: Callable[..., pretrain.PretrainConfig], no_model: None
) -> None:
    """DPO's precomputed reference would be scored first."""
    with pytest.raises(ValueError, match=r"warmup_steps: got 9, expected at most the 2 steps"):
        pretrain.run(pretraining(max_steps=2, warmup_steps=9))


@pytest.mark.parametrize(
    ("changes", "steps"), [({}, 3), ({"epochs": 2.5}, 7), ({"epochs": None, "max_steps": 2}, 2)]
)
def test_epochs_are_rounded_up_to_steps(changes: dict[str, Any], steps: int) -> None:
    config = TrainConfig(train_data="x", output_dir="x", batch_size=4, **changes)
    assert batches.total_steps(config, rows=11) == steps


def test_each_step_is_taken_with_the_learning_rate_that_its_line_says_and_the_runs_seed(
    pretraining: Callable[..., pretrain.PretrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[float] = []
    update = loop.update

    def recording(
        world: World, model: Any, optimizer: torch.optim.Optimizer, *rest: Any, **options: Any
    ) -> Any:
        taken.append(optimizer.param_groups[0]["lr"])
        assert torch.initial_seed() == 5  # dropout draws from it
        return update(world, model, optimizer, *rest, **options)

    monkeypatch.setattr(loop, "update", recording)
    config = pretraining(max_steps=4, warmup_steps=2, eval_data=None, seed=5)
    pretrain.run(config)
    assert taken == [line["learning_rate"] for line in lines(config)]
    assert taken[0] < taken[1] > taken[3]
