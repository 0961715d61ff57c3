"""TRL's trainers with and without fastalign's head: what they log, and who scored the tokens."""

from __future__ import annotations

from typing import Any

import pytest

trl = pytest.importorskip("trl", reason="trl is not installed")

from bench.experiments.trl_runs import train, worst_difference  # noqa: E402
from fastalign.integrations import trl as integration  # noqa: E402
from fastalign.integrations.hosts import UnsupportedHostError  # noqa: E402

SCORING = ["SFT", "DPO", "KTO", "GRPO", "RLOO"]


def assert_same(trainer: str, **options: Any) -> None:
    """Every logged number is the same to 1e-5 (1e-6 below 0.1), and we are called as often as TRL was."""
    without, patched = (train(trainer, patched=patched, steps=2, **options) for patched in (False, True))
    difference, name = worst_difference(patched, without)
    assert difference < 1e-5, name
    assert len(patched.logs) == 3 + ("eval_strategy" in options) and len(patched.logs[0]) > 5
    assert patched.fastalign_calls == without.trl_calls > 0 == patched.trl_calls


@pytest.mark.parametrize("trainer", SCORING)
def test_a_trainer_logs_the_same_numbers(trainer: str) -> None:
    assert_same(trainer)


def test_the_reward_trainer_makes_no_call_and_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    without, patched = (train("Reward", patched=patched, steps=1) for patched in (False, True))
    assert patched.logs == without.logs and patched.fastalign_calls == 0
    assert not [warning for warning in recwarn if "fastalign" in str(warning.message)]


def test_another_version_of_trl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastalign.integrations.hosts.version", lambda name: "1.17.0")
    with pytest.raises(UnsupportedHostError, match=r"^trl: got version 1\.17\.0, expected 1\.16, "):
        integration.patch()


def test_other_parameters_of_trl_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import trl.trainer.utils as utils

    class Older:
        @staticmethod
        def forward(ctx, hidden, weight, bias, targets, temperature, chunk_size): ...

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Older)
    with pytest.raises(
        UnsupportedHostError, match="^trl: got trl.trainer.utils._ChunkedLogProbFunction.forward"
    ):
        integration.patch()
    assert utils._ChunkedLogProbFunction is Older


def test_unpatch_gives_everything_back() -> None:
    import transformers.trainer
    import trl.trainer.utils as utils

    before = utils._ChunkedLogProbFunction, utils._use_triton, [*transformers.trainer.DEFAULT_CALLBACKS]
    with integration.patch() as handle:
        assert utils._ChunkedLogProbFunction is not before[0] and integration.patch() is handle
    after = utils._ChunkedLogProbFunction, utils._use_triton, [*transformers.trainer.DEFAULT_CALLBACKS]
    assert after == before
