"""PPO on a tiny model: clipping, padding, memory, penalties, references, learning, plain calls."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from fastalign.actor_critic import VALUE_HEAD, ActorCritic
from fastalign.causal_lm import fuse_head
from fastalign.data import load_rows, tokenize_prompts
from fastalign.stages import ppo
from fastalign.stages.models import loading
from fastalign.stages.policy.reward_functions import by_function, find_function
from fastalign.stages.ppo import PPOOptions, ppo_step, rollout
from tests.stages.ppo.policies import ENDS, PROMPTS, Make, actor_critic, lengths
from tests.stages.tiny import lines, sentence


@pytest.mark.parametrize("compiled", [False, True])
def test_compile_rollout_compiles_the_policy_where_it_draws(
    base: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiles: list[Any] = []

    def compile_nothing(model: Any) -> Any:
        compiles.append(model)
        return model

    monkeypatch.setattr(torch, "compile", compile_nothing)
    model = actor_critic(base)
    options = PPOOptions(max_new_tokens=3, compile_rollout=compiled)
    rollout(model, PROMPTS[:2], lengths, options, **ENDS)
    assert compiles == [model.policy] * compiled


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
    config = loading.CONFIG_MAPPING["gpt2"](vocab_size=V, n_embd=16, n_layer=1, n_head=1, n_positions=64)
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
        make(lora_rank=4, max_steps=3, reference=reference, learning_rate=1e-2, **options)
        for reference in ("copy", "adapters_off", "auto")
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
    with pytest.raises(ValueError, match=r"score: got shape \[2\], expected \[8\]"):
        rollout(model, PROMPTS, lambda prompts, completions: torch.ones(2), options, **ENDS)
    with pytest.raises(FloatingPointError, match="score: got no finite number for 2 of 8 completions"):
        rollout(
            model, PROMPTS, lambda prompts, completions: [math.nan, math.inf] + [0.0] * 6, options, **ENDS
        )
    experience = rollout(model, PROMPTS, lengths, options, **ENDS)
    with pytest.raises(
        ValueError,
        match=(
            r"experience: got 8 completions, expected a multiple of "
            r"minibatches x micro_batch_size x ranks \(3 x 2 x 1\)"
        ),
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
