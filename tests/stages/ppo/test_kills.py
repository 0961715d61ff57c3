"""PPO goes on bitwise after a kill or a SIGTERM between rollout and update."""

import dataclasses
import signal
from typing import Any

import pytest
import torch

from fastalign.faults import Stopped
from fastalign.stages import ppo
from fastalign.stages.policy.ppo_experience import Experience
from fastalign.stages.ppo import ppo_step, rollout
from fastalign.stages.runs import checkpoint
from tests.stages.ppo.policies import Make
from tests.stages.tiny import lines, weights


class Killed(BaseException):
    """The run's process ends."""


@pytest.mark.parametrize(
    "options", [{"target_kl": 0.01, "kl_horizon": 8}, {"lora_rank": 4, "value": "shared"}]
)
def test_a_run_killed_between_rollout_and_update_goes_on_bitwise(
    make: Make, files: dict[str, str], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    options = options | {
        "max_steps": 5,
        "save_every": 2,
        "minibatches": 2,
        "dtype": "float32",
        "eval_data": files["held_out"],
    }
    whole, stopped = make(**options), make(**options)
    ppo.run(whole)
    drawn: list[list[list[int]]] = []

    def killed(
        model: Any, optimizer: Any, experience: Any, *arguments: Any, step: int, **given: Any
    ) -> dict[str, float]:
        if step == 3:
            drawn.append(experience.completions)
            raise Killed
        return ppo_step(model, optimizer, experience, *arguments, step=step, **given)

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "ppo_step", killed)
        with pytest.raises(Killed):
            ppo.run(stopped)
    assert checkpoint.latest(stopped.output_dir).name == "step-00000002"  # type: ignore[union-attr]
    torch.randn(3)  # what the process did before must not matter
    with monkeypatch.context() as patch:
        patch.setattr(ppo, "ppo_step", killed)  # the resumed run draws the same tokens
        with pytest.raises(Killed):
            ppo.run(dataclasses.replace(stopped, resume=True))
    assert drawn[0] == drawn[1]
    ppo.run(dataclasses.replace(stopped, resume=True))
    assert lines(stopped) == lines(whole)
    for part in ["model"] if "value" in options else ["model", "value"]:
        expected, found = weights(whole, part), weights(stopped, part)
        assert expected.keys() == found.keys() and all(
            torch.equal(expected[name], found[name]) for name in expected
        )
    if "target_kl" in options:
        assert len({line.get("kl_coef") for line in lines(whole)[1:]}) == 5, "the coefficient must have moved"


def test_sigterm_during_a_rollout_finishes_the_step_and_the_run_goes_on_bitwise(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = make(max_steps=3, dtype="float32"), make(max_steps=3, dtype="float32")
    ppo.run(whole)

    def signalled(*arguments: Any, step: int = 0, **options: Any) -> Experience:
        experience = rollout(*arguments, step=step, **options)
        if step == 1:
            signal.raise_signal(signal.SIGTERM)
        return experience

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "rollout", signalled)
        with pytest.raises(
            Stopped, match="after step 2, which is saved; go on with: fastalign ppo --config "
        ):
            ppo.run(stopped)
    ppo.run(dataclasses.replace(stopped, resume=True))
    assert lines(stopped) == lines(whole)
    assert all(torch.equal(tensor, weights(stopped)[name]) for name, tensor in weights(whole).items())
