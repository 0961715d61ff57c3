"""PPO's steps by hand in plain PyTorch; micro-batches, packing and ranks change nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2LMHeadModel,
)

from fastalign.stages import ppo
from fastalign.stages.config import save_config
from fastalign.stages.models import loading
from fastalign.stages.ppo import PPOConfig, rollout
from tests.stages.ppo.policies import Make, plain
from tests.stages.tiny import assert_close, lines, torchrun


def close(one: PPOConfig, other: PPOConfig) -> None:
    """fp64 to 1e-9: the weights of all models, and the metrics of every step."""
    assert_close(
        one, other, atol=1e-9, rel=1e-8, parts=("model", "value") if one.value == "own" else ("model",)
    )


# The first minibatch


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("float64", {}),
        ("float32", {"value": "shared"}),
        ("float64", {"top_p": 0.7, "temperature": 1.7}),
        ("float32", {"top_k": 5, "min_p": 0.01, "temperature": 0.6, "lora_rank": 4, "value": "shared"}),
        ("float64", {"rescore": True, "importance_cap": 2.0, "kl_in": "loss", "top_p": 0.8}),
    ],
)
def test_the_first_minibatch_has_ratio_1_and_clips_nothing(
    make: Make, dtype: str, options: dict[str, Any]
) -> None:
    config = make(dtype=dtype, **options)
    first = ppo.run(config)
    rounding = 1e-5 if dtype == "float32" else 1e-9
    assert first["val/ratio"] == pytest.approx(1, abs=rounding) and first["mismatch/ratio"] == pytest.approx(
        1, abs=rounding
    )
    assert (
        first["policy/approxkl_avg"] == pytest.approx(0, abs=rounding**2)
        and first["mismatch/approxkl"] < rounding**2
    )
    assert first["policy/clipfrac_avg"] == first["val/clipfrac_avg"] == first["val/ratio_var"] == 0
    assert first["objective/kl"] == pytest.approx(0, abs=20 * rounding), (
        "the policy is the reference before its first step"
    )


def advantages_by_hand(
    config: PPOConfig, rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """GAE by its definition, a token at a time, then whitening over all tokens."""
    advantages = torch.zeros_like(values)
    for row in range(len(mask)):
        following: Any = 0.0
        running: Any = 0.0
        for t in reversed(range(int(mask[row].sum()))):
            running = (
                rewards[row, t]
                + config.gamma * following
                - values[row, t]
                + config.gamma * config.lam * running
            )
            advantages[row, t], following = running, values[row, t]
    returns = advantages + values * mask
    if config.whiten_advantages:
        kept = advantages[mask]
        advantages = (advantages - kept.mean()) / (kept.var() + 1e-8).sqrt() * mask
    return advantages, returns


@pytest.mark.parametrize(
    "options",
    [
        {
            "value": "shared",
            "gamma": 0.9,
            "entropy_coef": 0.01,
            "temperature": 1.3,
            "whiten_rewards": True,
            "missing_eos_penalty": 0.5,
        },
        {
            "value": "own",
            "kl_in": "loss",
            "kl_estimator": "k2",
            "whiten_advantages": False,
            "dual_clip": 1.5,
            "clip_high": 0.1,
        },
    ],
)
def test_steps_are_plain_pytorchs(
    make: Make, files: dict[str, str], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    config = make(
        max_steps=2,
        ppo_epochs=2,
        minibatches=2,
        micro_batch_size=2,
        kl_coef=0.2,
        max_grad_norm=0.7,
        vf_coef=0.3,
        **options,
    )
    experiences: list[Any] = []
    draw = rollout

    def noted(*arguments: Any, **given: Any) -> Any:
        experiences.append(draw(*arguments, **given))
        return experiences[-1]

    monkeypatch.setattr(ppo, "rollout", noted)
    ppo.run(config)
    shared = config.value == "shared"
    model, frozen = (
        GPT2LMHeadModel.from_pretrained(config.model, dtype=torch.float64).eval() for _ in range(2)
    )
    critic = GPT2LMHeadModel.from_pretrained(config.model, dtype=torch.float64).eval().transformer
    head = torch.nn.Linear(32, 1, bias=shared, dtype=torch.float64)
    for weight in head.parameters():
        torch.nn.init.zeros_(weight)
    policy_parameters = list(model.parameters())
    value_parameters = list(head.parameters()) + ([] if shared else list(critic.parameters()))
    optimizer = torch.optim.AdamW(
        policy_parameters + value_parameters, betas=(0.9, 0.95), eps=1e-8, weight_decay=0
    )

    def values_of(experience: Any, hidden: torch.Tensor) -> torch.Tensor:
        if not shared:
            rows = zip(experience.prompts, experience.completions, strict=True)
            states = [
                critic(torch.tensor([p + ids])).last_hidden_state[0, len(p) - 1 : -1] for p, ids in rows
            ]
            hidden = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
        return head(hidden)[..., 0]

    for step, line in enumerate(lines(config)):
        experience = experiences[step]
        mask = experience.mask
        with torch.no_grad():
            old, _, hidden = plain(model, experience, config.temperature)
            reference, _, _ = plain(frozen, experience, config.temperature)
            old_values = values_of(experience, hidden) * mask
        tokenizer = loading.load_tokenizer(config.model)
        texts = tokenizer.batch_decode(experience.completions, skip_special_tokens=True)
        scores = torch.tensor([text.count("a") - 0.05 * len(text) for text in texts], dtype=torch.float64)
        if config.missing_eos_penalty:
            scores = scores - torch.tensor([0.0 if ids[-1] == 0 else 0.5 for ids in experience.completions])
        in_reward = config.kl_in == "reward"
        rewards = -config.kl_coef * (old - reference) * mask if in_reward else torch.zeros_like(old)
        expected = {"objective/scores": scores.mean(), "objective/non_score_reward": rewards.sum(1).mean()}
        expected |= {
            "objective/kl": ((old - reference) * mask).sum(1).mean(),
            "objective/entropy": -(old * mask).sum(1).mean(),
        }
        expected["objective/rlhf_reward"] = (
            expected["objective/scores"] + expected["objective/non_score_reward"]
        )
        for row, ids in enumerate(experience.completions):
            rewards[row, len(ids) - 1] += scores[row]
        if config.whiten_rewards:
            rewards = rewards / (rewards[mask].var() + 1e-8).sqrt() + rewards[mask].mean() * (
                1 - 1 / (rewards[mask].var() + 1e-8).sqrt()
            )
        advantages, returns = advantages_by_hand(config, rewards * mask, old_values, mask)
        sums: dict[str, float] = {}
        ratios, norms, tokens = [], [], 0
        for epoch in range(2):
            order = torch.from_numpy(np.random.default_rng((config.seed, step, epoch)).permutation(8))
            for rows in order.chunk(2):
                inside = mask[rows]
                logp, entropy, hidden = plain(model, experience, config.temperature)
                values = values_of(experience, hidden)[rows]
                ratio = (logp - old)[rows].exp()
                a, high = advantages[rows], config.clip_high or config.clip
                policy = torch.maximum(-a * ratio, -a * ratio.clamp(1 - config.clip, 1 + high))
                if config.dual_clip:
                    policy = torch.where(a < 0, torch.minimum(policy, -a * config.dual_clip), policy)
                kl = (logp - reference)[rows] ** 2 / 2 if not in_reward else torch.zeros_like(ratio)
                held = old_values[rows] + (values - old_values[rows]).clamp(-0.2, 0.2)
                value = 0.5 * torch.maximum((values - returns[rows]) ** 2, (held - returns[rows]) ** 2)
                terms = {
                    "loss/policy_avg": policy,
                    "loss/value_avg": value,
                    "policy/entropy_avg": entropy[rows],
                    "val/ratio": ratio,
                }
                terms["policy/approxkl_avg"] = (logp - old)[rows] ** 2 / 2
                terms["loss"] = (
                    policy
                    - config.entropy_coef * entropy[rows]
                    + config.kl_coef * kl
                    + config.vf_coef * value
                )
                means = {name: (term * inside).sum() / inside.sum() for name, term in terms.items()}
                means["loss"].backward()
                norms.append(
                    [
                        float(torch.nn.utils.clip_grad_norm_(part, 0.7))
                        for part in (policy_parameters, value_parameters)
                    ]
                )
                for group in optimizer.param_groups:
                    group["lr"] = line["learning_rate"]
                optimizer.step()
                optimizer.zero_grad()
                tokens += int(inside.sum())
                ratios.append(means["val/ratio"].item())
                for name, mean in means.items():
                    sums[name] = sums.get(name, 0.0) + mean.item() * int(inside.sum())
        numbers = {name: total.item() for name, total in expected.items()} | {
            name: total / tokens for name, total in sums.items()
        }
        numbers |= {
            "val/ratio_var": float(np.var(ratios)),
            "mismatch/ratio": ratios[0],
            "episode": 8 * (step + 1),
        }
        numbers |= dict(
            zip(
                ("policy/grad_norm", "val/grad_norm"),
                (sum(norm) / 4 for norm in zip(*norms, strict=True)),
                strict=True,
            )
        )
        numbers["val/num_eos_tokens"] = sum(ids[-1] == 0 for ids in experience.completions)
        assert {name: line[name] for name in numbers} == pytest.approx(numbers, rel=1e-6, abs=1e-9)
    assert lines(config)[1]["policy/clipfrac_avg"] > 0 and abs(lines(config)[1]["objective/kl"]) > 1e-3, (
        "the options were at work"
    )
    saved = AutoModelForCausalLM.from_pretrained(Path(config.output_dir, "model"), dtype=torch.float64)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(saved.get_parameter(name), weight, rtol=0, atol=1e-7)


# Accumulation, packing, ranks, resume


def test_micro_batches_and_packing_change_nothing(make: Make, files: dict[str, str]) -> None:
    options: dict[str, Any] = {
        "max_steps": 2,
        "minibatches": 2,
        "ppo_epochs": 2,
        "eval_data": files["held_out"],
        "rescore": True,
    }
    changed: list[dict[str, Any]] = [{"micro_batch_size": 1}, {"packing": False}, {"rollout_batch_size": 3}]
    whole, *rest = (make(**options, **more) for more in ({}, *changed))
    ppo.run(whole)
    for config in rest:
        ppo.run(config)
        close(whole, config)


def test_two_gloo_ranks_equal_one_process(make: Make, files: dict[str, str], tmp_path: Path) -> None:
    # Seven held-out rows: the ranks get unequal numbers of them. The advantages are whitened over both ranks'
    # tokens.
    options: dict[str, Any] = {
        "max_steps": 2,
        "minibatches": 2,
        "micro_batch_size": 2,
        "ppo_epochs": 2,
        "eval_data": files["held_out"],
    }
    # With checkpointed activations a process hung at its end whose DistributedDataParallel outlived the
    # process group.
    options |= {
        "target_kl": 0.01,
        "kl_horizon": 8,
        "whiten_rewards": True,
        "value": "shared",
        "gradient_checkpointing": True,
    }
    alone, together = make(**options), make(**options)
    ppo.run(alone)
    save_config(together, tmp_path / "two.yaml")
    torchrun(2, "fastalign.stages.ppo", "--config", str(tmp_path / "two.yaml"))
    close(alone, together)
