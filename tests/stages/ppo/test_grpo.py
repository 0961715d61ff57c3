"""GRPO: TRL's loss and advantages, plain runs, micro-batches, ranks, kills, references and learning."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from fastalign.causal_lm import fuse_head
from fastalign.data import Prompt
from fastalign.stages import grpo
from fastalign.stages.config import save_config
from fastalign.stages.grpo import GRPOConfig, GRPOOptions, grpo_objective, grpo_rollout, grpo_step
from fastalign.stages.models import loading
from fastalign.stages.policy import models as policy_models
from fastalign.stages.policy.rollouts import token_batch
from tests.stages.ranks import run_two_ranks
from tests.stages.tiny import assert_close, lines, weights

PROMPTS = [Prompt([5 + n, *range(7, 7 + n)], {}) for n in range(3)]
ENDS: dict[str, Any] = {"eos_id": list(range(2, 60)), "pad_id": 1}
LOSSES = ("grpo", "dapo", "dr_grpo")
Make = Callable[..., GRPOConfig]


def digits(prompts: Any, completions: Any) -> torch.Tensor:
    """A score that anybody can compute."""
    return torch.tensor([float(sum(token % 7 for token in ids)) for ids in completions])


def policy_of(base: str, dtype: torch.dtype = torch.float64) -> Any:
    return fuse_head(GPT2LMHeadModel.from_pretrained(base, dtype=dtype)).eval()  # without dropout


@pytest.fixture
def configure(files: dict[str, str], base: str, tmp_path: Path) -> Make:
    """A function from fields to a small configuration with an output_dir of its own, in fp64."""
    runs = itertools.count()

    def make(**changes: Any) -> GRPOConfig:
        values: dict[str, Any] = {
            "train_data": files["prompts"],
            "model": base,
            "output_dir": str(tmp_path / f"run{next(runs)}"),
            "reward": files["functions"] + ":count",
            "max_new_tokens": 8,
            "group_size": 4,
            "batch_size": 8,
            "learning_rate": 1e-3,
            "max_steps": 2,
            "dtype": "float64",
            "device": "cpu",
        }
        return GRPOConfig(**(values | changes))

    return make


# TRL's numbers


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_trls(scale: str) -> None:
    utils = pytest.importorskip("trl.trainer.utils", reason="trl is not installed")
    rewards = torch.tensor([1.0, 0, 0, 1, 3, 3, 3, 3, 0.1, 0.7, -2, 5], dtype=torch.float64)
    deviation = {
        "group": utils.nanstd(rewards.view(-1, 4), dim=1).repeat_interleave(4),
        "batch": utils.nanstd(rewards).expand_as(rewards),
        "none": torch.full_like(rewards, 1 - 1e-4),
    }[scale]
    centred = rewards - rewards.view(-1, 4).mean(1).repeat_interleave(4)
    torch.testing.assert_close(grpo.group_advantages(rewards, 4, scale), centred / (deviation + 1e-4))


@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_loss_and_its_gradient_are_trls(base: str, tmp_path: Path, loss_type: Any) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    policy = policy_of(base, torch.float32)
    options = GRPOOptions(
        max_new_tokens=10,
        group_size=4,
        loss_type=loss_type,
        kl_coef=0.3,
        clip=0.1,
        clip_high=0.25,
        temperature=1.3,
        entropy_coef=0.0,
        mask_truncated=True,
    )
    # Of one length: TRL pads on the left and leaves GPT-2's positions to the padding.
    alike = [Prompt([5 + n, 9, 11 + n], {}) for n in range(3)]
    drawn = grpo_rollout(policy, alike, digits, options, **ENDS, reference=policy_of(base, torch.float32))
    assert 0 < (drawn.learnt.sum(1) > 0).sum() < 12, "some completions are truncated"
    torch.manual_seed(0)
    assert drawn.reference_logp is not None
    drawn = drawn._replace(
        old_logp=drawn.old_logp + 0.2 * torch.randn_like(drawn.old_logp) * drawn.mask,
        reference_logp=drawn.reference_logp + 0.2 * torch.randn_like(drawn.old_logp) * drawn.mask,
    )
    trainer = trl.GRPOTrainer(
        model=GPT2LMHeadModel.from_pretrained(base, dtype=torch.float32),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=trl.GRPOConfig(
            output_dir=str(tmp_path / "trl"),
            loss_type=loss_type,
            beta=0.3,
            use_bias_correction_kl=False,  # k3 as in GRPO's paper, without the ratio as its weight
            epsilon=0.1,
            epsilon_high=0.25,
            temperature=1.3,
            num_generations=4,
            per_device_train_batch_size=12,
            max_completion_length=10,
            bf16=False,
            use_cpu=True,
            report_to="none",
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a"}]),
        processing_class=loading.load_tokenizer(base),
    )
    model = trainer.model.eval()
    prompts = torch.tensor(drawn.prompts)
    R = drawn.mask.shape[1]
    expected = trainer._compute_loss(
        model,
        {
            "prompt_ids": prompts,
            "prompt_mask": torch.ones_like(prompts),
            "completion_ids": torch.tensor([ids + [1] * (R - len(ids)) for ids in drawn.completions]),
            "completion_mask": drawn.learnt.long(),
            "advantages": drawn.advantages[:, 0],
            "old_per_token_logps": drawn.old_logp,
            "ref_per_token_logps": drawn.reference_logp,
            "num_items_in_batch": drawn.learnt.sum(),
        },
    )
    expected.backward()
    # In two micro-batches.
    losses = []
    for rows in ([3, 0, 7, 8, 1], [2, 4, 5, 6, 9, 10, 11]):
        names = ["old_logp", "advantages", "learnt", "reference_logp"]
        batch = token_batch(drawn, rows, names, pad_id=1, packing=True)
        loss, _ = grpo_objective(options, 12)(policy, batch, drawn.learnt.sum())
        loss.backward()
        losses.append(loss.item())
    assert sum(losses) == pytest.approx(expected.item(), abs=1e-5)
    theirs = dict(model.named_parameters())
    for name, weight in policy.named_parameters():
        assert weight.grad is not None and theirs[name].grad is not None
        torch.testing.assert_close(weight.grad, theirs[name].grad, rtol=1e-4, atol=1e-5)


# What must not matter


@pytest.mark.parametrize("loss_type", LOSSES)
def test_micro_batches_packing_and_ranks_change_nothing(
    configure: Make, tmp_path: Path, loss_type: str
) -> None:
    options: dict[str, Any] = {
        "loss_type": loss_type,
        "kl_coef": 0.1,
        "top_p": 0.9,
        "inner_epochs": 2,
        "entropy_coef": 0.01,
        "rescore": True,
        "importance_cap": 2.0,
    }
    whole = configure(**options)
    pieces = configure(**options, packing=False, micro_batch_size=2, rollout_batch_size=3)
    ranks = configure(**options, micro_batch_size=2)
    for config in (whole, pieces):
        grpo.run(config)
    if loss_type == "grpo":  # one run on two ranks is enough: what they share does not depend on the loss
        save_config(ranks, tmp_path / "ranks.yaml")
        run_two_ranks(tmp_path, "fastalign.stages.grpo", "--config", str(tmp_path / "ranks.yaml"))
    for config in (pieces, ranks) if loss_type == "grpo" else (pieces,):
        assert_close(whole, config, atol=1e-9, rel=1e-8)
    assert lines(whole)[-1]["grad_norm"] > 0.1


def test_a_run_killed_between_rollout_and_update_goes_on_bitwise(
    configure: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"max_steps": 5, "save_every": 2, "minibatches": 2, "dtype": "float32"}
    whole, stopped = configure(**options, top_k=20), configure(**options, top_k=20)
    grpo.run(whole)

    class Killed(BaseException):
        """The run's process ends."""

    def killed(*arguments: Any, step: int, **given: Any) -> dict[str, float]:
        if step == 3:
            raise Killed
        return grpo_step(*arguments, step=step, **given)

    with monkeypatch.context() as patch:
        patch.setattr(grpo, "grpo_step", killed)
        with pytest.raises(Killed):
            grpo.run(stopped)
    torch.randn(3)  # what the process did before must not matter
    grpo.run(dataclasses.replace(stopped, resume=True))
    assert lines(stopped) == lines(whole)
    assert all(torch.equal(tensor, weights(stopped)[name]) for name, tensor in weights(whole).items())


# The parts


@pytest.mark.parametrize(
    "options",
    [{}, {"top_p": 0.7, "temperature": 1.7}, {"top_k": 5, "min_p": 0.01, "lora_rank": 4, "kl_coef": 0.1}],
)
def test_the_first_minibatch_has_ratio_1_and_clips_nothing(configure: Make, options: dict[str, Any]) -> None:
    first = grpo.run(configure(max_steps=1, **options))
    assert first["policy/ratio_avg"] == pytest.approx(1, abs=1e-9) == first["mismatch/ratio"]
    assert first["policy/clipfrac_avg"] == 0 and first["policy/approxkl_avg"] < 1e-18
    assert ("objective/kl" in first) == ("policy/kl_avg" in first) == ("kl_coef" in options)
    assert first.get("policy/kl_avg", 0.0) == pytest.approx(0, abs=1e-9)


def test_the_divergence_counts_in_the_reward_of_a_completion(base: str) -> None:
    policy, reference = policy_of(base), policy_of(base)
    with torch.no_grad():
        for weight in reference.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    options = GRPOOptions(max_new_tokens=6, group_size=4, kl_coef=0.5, kl_in="reward", scale_rewards="none")
    drawn = grpo_rollout(policy, PROMPTS, digits, options, **ENDS, reference=reference)
    assert drawn.reference_logp is not None
    rewards = drawn.scores - 0.5 * (drawn.old_logp - drawn.reference_logp).sum(1)
    expected = (rewards.view(3, 4) - rewards.view(3, 4).mean(1, keepdim=True)).flatten()
    torch.testing.assert_close(drawn.advantages, expected[:, None] * drawn.mask)
    assert drawn.metrics["objective/non_score_reward"] == pytest.approx(
        (rewards - drawn.scores).mean().item()
    )
    assert [len(drawn.prompts), drawn.prompts[:4]] == [12, [PROMPTS[0].input_ids] * 4]
    assert len({tuple(ids) for ids in drawn.completions[:4]}) == 4, "each draws with its own noise"


@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_step_of_truncated_completions_alone_learns_nothing(base: str, loss_type: Any) -> None:
    policy = policy_of(base)
    options = GRPOOptions(max_new_tokens=3, group_size=4, loss_type=loss_type, mask_truncated=True)
    drawn = grpo_rollout(policy, PROMPTS, digits, options, eos_id=0, pad_id=1)
    assert not drawn.learnt.any() and drawn.metrics["val/num_eos_tokens"] == 0
    before = [weight.clone() for weight in policy.parameters()]
    metrics = grpo_step(policy, torch.optim.SGD(policy.parameters(), lr=1.0), drawn, options, pad_id=1)
    assert metrics["loss"] == metrics["grad_norm"] == 0 and all(map(math.isfinite, metrics.values()))
    assert all(torch.equal(*pair) for pair in zip(before, policy.parameters(), strict=True))


def test_a_reference_is_loaded_only_for_a_divergence(
    configure: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copies: list[Any] = []
    copy = policy_models.copy.deepcopy

    def noted(value: Any, *rest: Any) -> Any:
        copies.extend([value] * isinstance(value, torch.nn.Module))
        return copy(value, *rest)

    monkeypatch.setattr(policy_models.copy, "deepcopy", noted)
    for options in ({}, {"kl_coef": 0.1}, {"reference": "copy"}):
        grpo.run(configure(max_steps=1, **options))
        assert bool(copies) == ("reference: " in capsys.readouterr().out) == bool(options)
        copies.clear()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 6}, r"batch_size: got 6, expected a multiple of group_size \(4\)"),
        ({"group_size": 1}, "group_size"),
        ({"scale_rewards": "sequence"}, "scale_rewards"),
        ({"reference": "none", "kl_coef": 0.1}, "reference: got none with kl_coef=0.1, expected kl_coef=0"),
        ({"minibatches": 3}, r"batch_size: got 8, expected a multiple of minibatches \(3\)"),
        ({"tail_eps": 0.01, "top_k": 3}, "tail_eps: got 0.01 with top_k, top_p or min_p"),
        ({"vf_coef": 0.1}, "unknown key 'vf_coef'"),
    ],
)
def test_a_wrong_configuration_is_refused_by_name(
    configure: Make, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        configure(**changes)


def test_a_policy_learns_what_is_rewarded_and_loads_as_transformers_own(
    configure: Make, files: dict[str, str], base: str
) -> None:
    config = configure(
        max_steps=8,
        batch_size=32,
        inner_epochs=2,
        dtype="float32",
        schedule="constant",
        learning_rate=1e-2,
        eval_data=files["held_out"],
    )
    grpo.run(config)
    scores = [line["objective/scores"] for line in lines(config) if "objective/scores" in line]
    assert sum(scores[-2:]) / 2 > scores[0] + 0.5
    assert lines(config)[-1]["eval/objective/scores"] > lines(config)[0]["eval/objective/scores"] + 0.3
    assert lines(config)[-1]["episode"] == 8 * 32 and lines(config)[-1]["epoch"] == 8 * 32 / (24 * 4)
    model = AutoModelForCausalLM.from_pretrained(Path(config.output_dir, "model"))
    start = AutoModelForCausalLM.from_pretrained(base)
    assert not torch.equal(*(each.get_input_embeddings().weight.float() for each in (model, start)))
