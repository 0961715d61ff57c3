"""PPO on a tiny model: a step by hand, first ratios, ranks, resume; and the defects of TRL's trainer, each a
test."""

import dataclasses
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2LMHeadModel,
)

from fastalign.actor_critic import VALUE_HEAD, ActorCritic
from fastalign.causal_lm import fuse_head
from fastalign.data import Prompt, load_rows, tokenize_prompts
from fastalign.faults import Stopped
from fastalign.rollout import generate
from fastalign.stages import build, checkpoint, ppo
from fastalign.stages.config import save_config
from fastalign.stages.experience import Experience
from fastalign.stages.ppo import PPOConfig, PPOOptions, ppo_step, rollout
from fastalign.stages.rewards import by_function, find_function
from fastalign.stages.world import World
from tests.stages.tiny import assert_close, lines, sentence, torchrun, weights

ALONE = World(0, 1, torch.device("cpu"))
Make = Callable[..., PPOConfig]


def close(one: PPOConfig, other: PPOConfig) -> None:
    """fp64 to 1e-9: the weights of all models, and the metrics of every step."""
    assert_close(
        one, other, atol=1e-9, rel=1e-8, parts=("model", "value") if one.value == "own" else ("model",)
    )


def actor_critic(base: str) -> ActorCritic:
    """The tiny model with a shared backbone, in fp64 and evaluation mode, that is, without dropout."""
    return ActorCritic(fuse_head(GPT2LMHeadModel.from_pretrained(base, dtype=torch.float64))).eval()


PROMPTS = [Prompt([5 + n, *range(7, 7 + n)], {}) for n in range(8)]
ENDS: dict[str, Any] = {"eos_id": 0, "pad_id": 1}


def lengths(prompts: Any, completions: Any) -> torch.Tensor:
    """A score that anybody can compute."""
    return torch.tensor([float(sum(token % 7 for token in ids)) for ids in completions])


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


# A step by hand


def plain(model: Any, experience: Any, temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A row at a time, from logits: log-probabilities and entropies [B, R], and the hidden states before each
    token [B, R, H]."""
    logps, entropies, states = [], [], []
    for prompt, ids in zip(experience.prompts, experience.completions, strict=True):
        hidden = model.transformer(torch.tensor([prompt + ids])).last_hidden_state[0, len(prompt) - 1 : -1]
        table = (model.lm_head(hidden) / temperature).log_softmax(-1)
        logps.append(table.gather(1, torch.tensor(ids)[:, None])[:, 0])
        entropies.append(-(table.exp() * table).sum(1))
        states.append(hidden)
    logp, entropy, hidden = (
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) for rows in (logps, entropies, states)
    )
    return logp, entropy, hidden


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
    own = list(model.parameters())
    others = list(head.parameters()) + ([] if shared else list(critic.parameters()))
    optimizer = torch.optim.AdamW(own + others, betas=(0.9, 0.95), eps=1e-8, weight_decay=0)

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
        tokenizer = build.load_tokenizer(config.model)
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
                norms.append([float(torch.nn.utils.clip_grad_norm_(part, 0.7)) for part in (own, others)])
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
    whole, *others = (make(**options, **more) for more in ({}, *changed))
    ppo.run(whole)
    for config in others:
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


# TRL's defects


def test_gradients_are_clipped(base: str) -> None:
    """TRL's loop never applied max_grad_norm."""
    model = actor_critic(base)
    options = PPOOptions(max_new_tokens=6, ppo_epochs=1, whiten_advantages=False, kl_coef=0)
    experience = rollout(
        model, PROMPTS, lambda prompts, completions: 1e6 * lengths(prompts, completions), options, **ENDS
    )
    moved = {}
    for limit in (0.5, None):
        before = {name: weight.clone() for name, weight in model.named_parameters()}
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        metrics = ppo_step(model, optimizer, experience, options, pad_id=1, max_grad_norm=limit)
        assert metrics["policy/grad_norm"] > 1e5
        for part in ("policy", "value"):
            steps = [
                (weight - before[name]).norm() / 1e-3
                for name, weight in model.named_parameters()
                if name.startswith(part)
            ]
            moved[part, limit] = torch.stack(steps).norm().item()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(before[name])
    assert moved["policy", 0.5] == pytest.approx(0.5, rel=1e-4) and moved["value", 0.5] == pytest.approx(
        0.5, rel=1e-4
    )
    assert moved["policy", None] > 1e5


def test_padding_enters_no_metric_and_no_gradient(base: str) -> None:
    """TRL's averages of approxkl and entropy run over padding."""
    model = actor_critic(base)
    options = PPOOptions(max_new_tokens=10, ppo_epochs=2, minibatches=2, entropy_coef=0.01, kl_in="loss")
    reference = actor_critic(base).policy
    experience = rollout(
        model, PROMPTS, lengths, options, eos_id=list(range(2, 60)), pad_id=1, reference=reference
    )
    assert len({len(ids) for ids in experience.completions}) > 2, "ragged"

    def wider(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dim() < 2:
            return value
        if value.dtype == torch.bool:
            return torch.nn.functional.pad(value, (0, 5))
        return torch.nn.functional.pad(value.masked_fill(~experience.mask, math.nan), (0, 5), value=math.nan)

    results = []
    for given in (experience, type(experience)(*map(wider, experience))):
        trained = actor_critic(base)
        metrics = ppo_step(trained, torch.optim.SGD(trained.parameters(), lr=0.1), given, options, pad_id=1)
        results.append((metrics, torch.cat([weight.detach().flatten() for weight in trained.parameters()])))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_nothing_of_the_size_of_all_logits_is_held() -> None:
    """TRL holds [B, R, V] of the policy, of the reference and of the samples."""
    V, B, R = 4001, 8, 24
    torch.manual_seed(0)
    config = build.CONFIG_MAPPING["gpt2"](vocab_size=V, n_embd=16, n_layer=1, n_head=1, n_positions=64)
    model = ActorCritic(fuse_head(AutoModelForCausalLM.from_config(config))).eval()
    reference = fuse_head(AutoModelForCausalLM.from_config(config)).eval()
    options = PPOOptions(max_new_tokens=R, ppo_epochs=1, rescore=True, entropy_coef=0.01)
    with Largest() as largest:
        experience = rollout(model, PROMPTS, lengths, options, eos_id=0, pad_id=1, reference=reference)
        ppo_step(model, torch.optim.SGD(model.parameters(), lr=0.1), experience, options, pad_id=1)
    assert experience.mask.sum() > 0.9 * B * R
    assert B * V <= largest.elements <= max(B * V, V * 16), (
        "the logits of one step, or the gradient of the head"
    )


def test_filters_of_the_rollout_leave_ratios_at_1_and_the_reference_is_tempered_too(base: str) -> None:
    """TRL's log-ratio compares scores after the warpers with those of training."""
    model, reference = actor_critic(base), actor_critic(base).policy
    options = PPOOptions(max_new_tokens=8, temperature=1.5, top_p=0.5)
    experience = rollout(model, PROMPTS, lengths, options, reference=reference, **ENDS)
    logp, _, _ = plain(model.policy, experience, 1.5)
    torch.testing.assert_close(experience.old_logp, logp * experience.mask, rtol=0, atol=1e-9)
    torch.testing.assert_close(experience.reference_logp, logp * experience.mask, rtol=0, atol=1e-9)
    assert experience.metrics["objective/entropy"] == pytest.approx(
        -(logp * experience.mask).sum(1).mean().item()
    )


# The mismatch of trainer and rollout


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
    monkeypatch.setattr("fastalign.stages.experience.generate", off)
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


def test_a_completion_without_an_end_is_penalised(base: str) -> None:
    ends = list(range(100, 300, 2))
    model = actor_critic(base)
    scored = [
        rollout(
            model,
            PROMPTS,
            lengths,
            PPOOptions(max_new_tokens=3, missing_eos_penalty=penalty),
            eos_id=ends,
            pad_id=1,
        )
        for penalty in (None, 2.5)
    ]
    ended = torch.tensor([ids[-1] in ends for ids in scored[0].completions])
    assert 0 < ended.sum() < 8 and scored[0].metrics["val/num_eos_tokens"] == ended.sum()
    torch.testing.assert_close(scored[0].scores - scored[1].scores, torch.where(ended, 0.0, 2.5).double())


# The KL divergence


def test_the_coefficient_follows_the_target(make: Make) -> None:
    options: dict[str, Any] = {"max_steps": 4, "kl_horizon": 80, "learning_rate": 1e-2}
    for target, factor in ((1e-6, 1.02), (1e6, 0.98)):
        config = make(target_kl=target, **options)
        ppo.run(config)
        coefficients = [line["kl_coef"] for line in lines(config)]
        kls = [line["objective/kl"] for line in lines(config)]
        for before, after, kl in zip(coefficients, coefficients[1:], kls):
            assert after == pytest.approx(before * (factor if kl > 1e-5 else 0.98))
        assert coefficients[0] == 0.05


@pytest.mark.parametrize("options", [{"kl_in": "reward"}, {"kl_in": "loss"}])
def test_adapters_off_is_the_reference_that_a_copy_is(make: Make, options: dict[str, Any]) -> None:
    runs = [
        make(lora_rank=4, max_steps=3, reference=way, learning_rate=1e-2, **options)
        for way in ("copy", "adapters_off", "auto")
    ]
    for config in runs:
        ppo.run(config)
    assert lines(runs[0]) == lines(runs[1]) == lines(runs[2])
    assert abs(lines(runs[0])[-1]["objective/kl"]) > 1e-4, "the policy must have left the reference"


def test_without_a_reference_there_is_no_divergence(make: Make) -> None:
    config = make(reference="none", kl_coef=0)
    assert "objective/kl" not in ppo.run(config) and lines(config)[0]["objective/non_score_reward"] == 0


# What is saved


@pytest.mark.hosts
def test_both_models_load_as_transformers_own(make: Make, base: str, reward_model: str) -> None:
    config = make(reward=reward_model, max_steps=2, learning_rate=1e-3, value_learning_rate=1e-5)
    ppo.run(config)
    folder = Path(config.output_dir)
    policy = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    assert not torch.equal(
        policy.get_input_embeddings().weight,
        AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight,
    )
    value = AutoModelForSequenceClassification.from_pretrained(folder / "value", dtype=torch.float64)
    start = AutoModelForSequenceClassification.from_pretrained(reward_model, dtype=torch.float64)
    change = (value.score.weight - start.score.weight).abs().max().item()
    assert 0 < change < 3e-5, "the value model starts from the reward model and takes its own learning rate"
    assert (
        AutoTokenizer.from_pretrained(folder / "value").get_vocab()
        == AutoTokenizer.from_pretrained(base).get_vocab()
    )


def test_a_shared_value_head_is_kept_beside_the_policy(make: Make) -> None:
    config = make(value="shared", max_steps=2)
    ppo.run(config)
    folder = Path(config.output_dir, "model")
    model = actor_critic(str(folder))
    assert not model.value.weight.any() and not folder.with_name("value").exists()
    model.load_value_head(folder)
    assert model.value.weight.any() and set(load_file(folder / VALUE_HEAD)) == {"weight", "bias"}


# Learning


@pytest.mark.parametrize(
    "options",
    [
        {"value": "own"},
        {"value": "shared", "lora_rank": 8, "learning_rate": 3e-2},
        {"value": "shared", "bf16": True},
    ],
)
def test_a_policy_learns_what_is_rewarded(make: Make, options: dict[str, Any]) -> None:
    config = make(
        max_steps=12,
        batch_size=32,
        ppo_epochs=2,
        dtype="float32",
        schedule="constant",
        **({"learning_rate": 1e-2} | options),
    )
    ppo.run(config)
    scores = [line["objective/scores"] for line in lines(config)]
    assert sum(scores[-2:]) / 2 > sum(scores[:2]) / 2 + 1.0


@pytest.mark.parametrize("value", ["own", "shared"])
def test_the_value_model_learns_the_returns(make: Make, files: dict[str, str], value: str) -> None:
    options: dict[str, Any] = {
        "reward": files["functions"] + ":of_the_prompt",
        "value_clip": None,
        "vf_coef": 1.0,
        "lam": 1.0,
    }
    options |= {
        "value": value,
        "learning_rate": 1e-5 if value == "own" else 1e-2,
        "value_learning_rate": 1e-2,
        "kl_coef": 0,
    }
    config = make(max_steps=10, batch_size=24, ppo_epochs=4, **options)
    ppo.run(config)
    assert (
        lines(config)[0]["val/explained_variance"] < 0.1 and lines(config)[-1]["val/explained_variance"] > 0.3
    )


def test_prompts_may_be_messages(make: Make, files: dict[str, str]) -> None:
    config = make(train_data=files["chats"], max_steps=2)
    ppo.run(config)
    prompts = tokenize_prompts(
        load_rows(files["chats"]), AutoTokenizer.from_pretrained(files["tokenizer"]), max_length=64
    )
    tokenizer = AutoTokenizer.from_pretrained(files["tokenizer"])
    assert tokenizer.decode(prompts[1].input_ids) == f"<s>user: {sentence(1)}<eos><s>assistant: "
    module = find_function(files["functions"] + ":count")
    score = by_function(module, tokenizer)(prompts[:2], [[70, 71, 0], [72, 0]])
    [(given, texts)] = module.call.__globals__["seen"]
    assert (
        given[0] == [{"role": "user", "content": sentence(0)}]
        and texts[1] == tokenizer.decode([72])
        and score.dtype == torch.float64
    )


def test_a_loop_of_ones_own_needs_no_configuration(base: str) -> None:
    model = actor_critic(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    options = PPOOptions(max_new_tokens=6, kl_coef=0)
    scores = []
    for step in range(12):
        experience = rollout(model, PROMPTS * 4, lengths, options, step=step, **ENDS)
        ppo_step(model, optimizer, experience, options, pad_id=1, step=step)
        scores.append(experience.metrics["objective/scores"])
    assert sum(scores[-2:]) > sum(scores[:2]) + 4


def test_a_plain_call_says_what_is_wrong(base: str) -> None:
    model, options = actor_critic(base), PPOOptions(max_new_tokens=3, minibatches=3)
    with pytest.raises(ValueError, match=r"score: returned \[2\], \[8\] wanted"):
        rollout(model, PROMPTS, lambda prompts, completions: torch.ones(2), options, **ENDS)
    with pytest.raises(FloatingPointError, match="score: 2 of 8 completions got no finite score"):
        rollout(
            model, PROMPTS, lambda prompts, completions: [math.nan, math.inf] + [0.0] * 6, options, **ENDS
        )
    experience = rollout(model, PROMPTS, lengths, options, **ENDS)
    with pytest.raises(
        ValueError,
        match=r"8 completions: a multiple of minibatches x micro_batch_size x ranks \(3 x 2 x 1\) wanted",
    ):
        ppo_step(model, torch.optim.SGD(model.parameters()), experience, options, pad_id=1)
    broken = experience._replace(advantages=experience.advantages * math.inf)
    before = [weight.clone() for weight in model.parameters()]
    with pytest.raises(
        FloatingPointError,
        match="update of step 1, 1: .*; the weights are still those of update of step 1, 0",
    ):
        ppo_step(model, torch.optim.SGD(model.parameters()), broken, PPOOptions(max_new_tokens=3), pad_id=1)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
