"""The policy that drew: its filters, its kept sets, and its mismatch with the trainer."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from fastalign.rollout import generate
from fastalign.stages.ppo import PPOOptions, ppo_step, rollout
from tests.stages.ppo.policies import ENDS, PROMPTS, actor_critic, lengths, plain


@pytest.mark.parametrize("filtered", [False, True])
def test_filters_of_the_rollout_leave_ratios_at_1_and_the_reference_is_tempered_too(
    base: str, filtered: bool
) -> None:
    """TRL's log-ratio compares scores after the warpers with those of training."""
    model, reference = actor_critic(base), actor_critic(base).policy
    options = PPOOptions(
        max_new_tokens=8, ppo_epochs=1, temperature=1.5, top_p=0.5, filtered_policy=filtered, rescore=False
    )
    experience = rollout(model, PROMPTS, lengths, options, reference=reference, **ENDS)
    logp, _, hidden = plain(model.policy, experience, 1.5)
    expected = logp * experience.mask
    if filtered:
        assert experience.kept is not None
        kept_ids = sum(len(sets.ids) for sets in experience.kept) / int(experience.mask.sum())
        assert experience.metrics["completions/kept_ids"] == pytest.approx(kept_ids)
        table = (model.policy.lm_head(hidden) / 1.5).log_softmax(-1)
        for row, sets in enumerate(experience.kept):
            for place, ids in enumerate(sets.ids.split(sets.offsets.diff().tolist())):
                assert experience.completions[row][place] in ids
                expected[row, place] -= table[row, place, ids.long()].logsumexp(0)
    else:
        assert experience.kept is None and "completions/kept_ids" not in experience.metrics
    torch.testing.assert_close(experience.old_logp, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(experience.reference_logp, expected, rtol=0, atol=1e-9)
    assert experience.metrics["objective/entropy"] == pytest.approx(-expected.sum(1).mean().item())
    options = dataclasses.replace(options, rescore=True)  # which scores as the update does
    rescored = rollout(model, PROMPTS, lengths, options, **ENDS)
    assert rescored.metrics["mismatch/ratio"] == pytest.approx(1, abs=1e-9)
    weights = [weight.clone() for weight in model.parameters()]
    for given, ratio in ((experience, 1.0), (experience._replace(kept=None), 0.5)):
        metrics = ppo_step(model, torch.optim.SGD(model.parameters(), lr=0), given, options, pad_id=1)
        if ratio == 1 or filtered:
            assert metrics["val/ratio"] == pytest.approx(ratio, abs=1e-9 if ratio == 1 else 0.2)
    assert all(torch.equal(*pair) for pair in zip(weights, model.parameters(), strict=True))


def test_packed_kept_sets_train_as_separate_rows_do(base: str) -> None:
    options = PPOOptions(max_new_tokens=8, ppo_epochs=2, top_p=0.6, entropy_coef=0.01, kl_in="loss")
    found = []
    for packing, micro in ((True, None), (False, 2)):
        model, reference = actor_critic(base), actor_critic(base).policy
        given: dict[str, Any] = {"pad_id": 1, "packing": packing, "micro_batch_size": micro}
        ends = list(range(2, 60))
        experience = rollout(model, PROMPTS, lengths, options, eos_id=ends, reference=reference, **given)
        assert len({len(ids) for ids in experience.completions}) > 2, "ragged"
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        metrics = ppo_step(model, optimizer, experience, options, **given)
        found.append((metrics, torch.cat([weight.detach().flatten() for weight in model.parameters()])))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-9, abs=1e-12)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("rescore", [False, True])
def test_a_mismatch_is_logged_and_weighs_tokens_at_most_by_the_cap(
    base: str, monkeypatch: pytest.MonkeyPatch, rescore: bool
) -> None:
    def off(*arguments: Any, **options: Any) -> Any:
        drawn = generate(*arguments, **options)
        return drawn._replace(logp=drawn.logp - torch.where(drawn.tokens % 2 == 0, 0.1, 0.4) * drawn.mask)

    model = actor_critic(base)
    cap = 1.2 if rescore else None
    options = PPOOptions(max_new_tokens=8, ppo_epochs=1, kl_coef=0, rescore=rescore, importance_cap=cap)
    plainly = rollout(model, PROMPTS, lengths, options, **ENDS)
    monkeypatch.setattr("fastalign.stages.policy.rollouts.generate", off)
    experience = rollout(model, PROMPTS, lengths, options, **ENDS)
    even = torch.tensor([token % 2 == 0 for ids in experience.completions for token in ids])
    found = ppo_step(model, torch.optim.SGD(model.parameters(), lr=0), experience, options, pad_id=1)
    found = experience.metrics | found
    assert found["mismatch/ratio"] == pytest.approx(
        torch.where(even, 0.1, 0.4).double().exp().mean().item(), rel=1e-6
    )
    assert found["mismatch/approxkl"] == pytest.approx(
        torch.where(even, 0.005, 0.08).double().mean().item(), rel=1e-6
    )
    assert found["val/ratio"] == pytest.approx(1 if rescore else found["mismatch/ratio"])
    weight = (experience.advantages / plainly.advantages)[experience.mask]
    expected = torch.where(even, math.exp(0.1), 1.2) if rescore else torch.ones(len(even))
    torch.testing.assert_close(weight, expected.double(), rtol=1e-6, atol=0)
