"""Steps of the reward model, DPO and KTO by hand, and against TRL's trainers."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2LMHeadModel,
)

from fastalign.data import Unpaired, load_rows, preference_pairs, tokenize_pairs, tokenize_unpaired
from fastalign.stages import optimization
from fastalign.stages.models import loading
from tests.stages.preference.runs import OURS_AS_TRL, Make, plain_logps, run, step_rows, trl_settings
from tests.stages.tiny import (
    lines,
)

# First losses


@pytest.mark.parametrize("reference", ["copy", "precomputed"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_first_losses_are_what_they_must_be(make: Make, dtype: str, reference: str) -> None:
    exact = 1e-6 if dtype == "float32" else 1e-12
    first = run(make("dpo", dtype=dtype, reference=reference))
    assert first["loss"] == pytest.approx(math.log(2), abs=exact)
    rewards = ("rewards/chosen", "rewards/rejected", "rewards/margins")
    assert [first[name] for name in rewards] == pytest.approx([0, 0, 0], abs=10 * exact)
    first = run(make("kto", dtype=dtype, reference=reference))
    assert first["loss"] == pytest.approx(0.5, abs=exact)
    assert [first[name] for name in (*rewards, "kl")] == pytest.approx([0] * 4, abs=10 * exact)
    first = run(make("reward", dtype=dtype, zero_head=True))
    assert first["loss"] == pytest.approx(math.log(2), abs=exact)
    assert first["mean_reward"] == first["margin"] == first["accuracy"] == 0


# A step by hand


def test_reward_steps_are_plain_pytorchs(make: Make, files: dict[str, str]) -> None:
    config = make(
        "reward",
        train_data=files["margins"],
        max_steps=2,
        center_coefficient=0.1,
        micro_batch_size=4,
        max_grad_norm=None,
    )
    run(config)
    torch.manual_seed(config.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        config.model, num_labels=1, dtype=torch.float64
    ).eval()
    rows = tokenize_pairs(load_rows(config.train_data), loading.load_tokenizer(config.model), max_length=64)
    optimizer = optimization.make_optimizer(config, model)
    for step, line in enumerate(lines(config)):
        pairs = step_rows(config, rows, step)
        chosen, rejected = (
            torch.cat([model(torch.tensor([sequence.input_ids])).logits[0] for sequence in side])
            for side in ([pair.chosen for pair in pairs], [pair.rejected for pair in pairs])
        )
        margins = torch.tensor([pair.margin for pair in pairs], dtype=torch.float64)
        loss = (-F.logsigmoid(chosen - rejected - margins) + 0.1 * (chosen + rejected) ** 2).mean()
        expected = {
            "loss": loss,
            "accuracy": (chosen > rejected).double().mean(),
            "margin": (chosen - rejected).mean(),
        }
        expected |= {"mean_reward": (chosen + rejected).mean() / 2}
        loss.backward()
        expected["grad_norm"] = torch.nn.utils.get_total_norm(
            [weight.grad for weight in model.parameters() if weight.grad is not None]
        )
        assert {name: line[name] for name in expected} == pytest.approx(
            {name: v.item() for name, v in expected.items()}, rel=1e-6
        )
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = line["learning_rate"]
        optimizer.step()
        optimizer.zero_grad()


def dpo_by_hand(
    config: Any, policy: torch.Tensor, reference: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    chosen, rejected = (policy - reference).chunk(2)
    if config.loss_type == "ipo":
        n_chosen, n_rejected = lengths.chunk(2)
        return ((chosen / n_chosen - rejected / n_rejected - 1 / (2 * config.beta)) ** 2).mean()
    margin = config.beta * (chosen - rejected)
    return -(
        (1 - config.label_smoothing) * F.logsigmoid(margin) + config.label_smoothing * F.logsigmoid(-margin)
    ).mean()


@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"loss_type": "ipo"}])
def test_dpo_steps_are_plain_pytorchs(make: Make, options: dict[str, Any]) -> None:
    config = make("dpo", max_steps=3, beta=0.3, micro_batch_size=4, max_grad_norm=None, **options)
    run(config)
    model, reference = (
        GPT2LMHeadModel.from_pretrained(config.model, dtype=torch.float64).eval() for _ in range(2)
    )
    rows = tokenize_pairs(load_rows(config.train_data), loading.load_tokenizer(config.model), max_length=64)
    optimizer = optimization.make_optimizer(config, model)
    for step, line in enumerate(lines(config)):
        pairs = step_rows(config, rows, step)
        sequences = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        policy = plain_logps(model, sequences)
        with torch.no_grad():
            frozen = plain_logps(reference, sequences)
        loss = dpo_by_hand(
            config, policy, frozen, torch.tensor([sum(sequence.trained) for sequence in sequences])
        )
        rewards = config.beta * (policy - frozen).detach()
        chosen, rejected = rewards.chunk(2)
        expected = {"loss": loss, "rewards/chosen": chosen.mean(), "rewards/rejected": rejected.mean()}
        expected |= {
            "rewards/margins": (chosen - rejected).mean(),
            "rewards/accuracies": (chosen > rejected).double().mean(),
        }
        expected |= dict(
            zip(("logps/chosen", "logps/rejected"), (part.mean() for part in policy.chunk(2)), strict=True)
        )
        loss.backward()
        expected["grad_norm"] = torch.nn.utils.get_total_norm(
            [weight.grad for weight in model.parameters() if weight.grad is not None]
        )
        if not step:
            del expected["rewards/accuracies"]  # of rewards that are zero to rounding
        numbers = {name: value.item() for name, value in expected.items()}
        assert {name: line[name] for name in expected} == pytest.approx(numbers, rel=1e-6, abs=1e-9)
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = line["learning_rate"]
        optimizer.step()
        optimizer.zero_grad()


def kto_by_hand(config: Any, model: Any, reference: Any, rows: list[Unpaired]) -> dict[str, torch.Tensor]:
    answered = [row.answered for row in rows]
    mismatched = [row.mismatched for row in rows if row.mismatched]
    good = torch.tensor([row.desirable for row in rows])
    policy = plain_logps(model, answered)
    with torch.no_grad():
        ratio = policy - plain_logps(reference, answered)
        kl = (plain_logps(model, mismatched) - plain_logps(reference, mismatched)).mean().clamp(min=0)
    x = config.beta * (policy - (policy.detach() - ratio) - kl)
    losses = torch.where(
        good, config.desirable_weight * (1 - x.sigmoid()), config.undesirable_weight * (1 - (-x).sigmoid())
    )
    means = {"loss": losses.mean(), "kl": kl}
    means |= {
        "rewards/chosen": config.beta * ratio[good].mean(),
        "rewards/rejected": config.beta * ratio[~good].mean(),
    }
    return means | {"logps/chosen": policy[good].mean(), "logps/rejected": policy[~good].mean()}


def test_kto_steps_are_plain_pytorchs(make: Make) -> None:
    config = make(
        "kto",
        max_steps=3,
        beta=0.3,
        micro_batch_size=2,
        desirable_weight=1.5,
        undesirable_weight=0.5,
        max_grad_norm=None,
    )
    run(config)
    model, reference = (
        GPT2LMHeadModel.from_pretrained(config.model, dtype=torch.float64).eval() for _ in range(2)
    )
    rows = tokenize_unpaired(
        load_rows(config.train_data), loading.load_tokenizer(config.model), max_length=64
    )
    optimizer = optimization.make_optimizer(config, model)
    for step, line in enumerate(lines(config)):
        picked = preference_pairs.mismatch(
            step_rows(config, rows, step), seed=config.seed, step=step, max_length=64
        )
        expected = kto_by_hand(config, model, reference, picked)
        expected["loss"].backward()
        expected["grad_norm"] = torch.nn.utils.get_total_norm(
            [weight.grad for weight in model.parameters() if weight.grad is not None]
        )
        numbers = {name: value.item() for name, value in expected.items()}
        assert {name: line[name] for name in expected} == pytest.approx(numbers, rel=1e-6, abs=1e-9)
        assert line["rewards/margins"] == pytest.approx(
            line["rewards/chosen"] - line["rewards/rejected"], abs=1e-12
        )
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = line["learning_rate"]
        optimizer.step()
        optimizer.zero_grad()
    assert lines(config)[2]["kl"] > 0, "the KL term must have been at work"


def test_apo_zero_needs_no_other_completions(make: Make, files: dict[str, str]) -> None:
    config = make("kto", train_data=files["alike"], loss_type="apo_zero_unpaired", batch_size=1, max_steps=2)
    assert run(config)["loss"] < 0.5
    assert {"kl", "rewards/rejected", "rewards/margins"}.isdisjoint(lines(config)[0])


# TRL's trainers


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("reward", {}),
        ("dpo", {}),
        ("dpo", {"loss_type": "ipo"}),
        ("kto", {"desirable_weight": 1.5, "undesirable_weight": 0.2}),
        ("kto", {"loss_type": "apo_zero_unpaired"}),
    ],
)
def test_the_first_steps_are_trls(
    make: Make, files: dict[str, str], tmp_path: Path, stage: str, options: dict[str, Any]
) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    # KTO: of two rows each can only meet the other's completion, which is where TRL's rotation leads too.
    rows = 2 if stage == "kto" else 24
    config = make(
        stage,
        **options,
        train_data=files["two" if stage == "kto" else "pairs"],
        batch_size=rows,
        **OURS_AS_TRL,
    )
    run(config)
    trainer_class, config_class = {
        "reward": (trl.RewardTrainer, trl.RewardConfig),
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
        "kto": (trl.KTOTrainer, trl.KTOConfig),
    }[stage]
    settings = config_class(
        **trl_settings(config, tmp_path / "trl", rows),
        **options,
    )
    auto = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
    torch.manual_seed(config.seed)
    model = auto.from_pretrained(
        config.model, dtype=torch.float32, **({"num_labels": 1} if stage == "reward" else {})
    )
    data = Dataset.from_list(list(load_rows(config.train_data)))
    trainer = trainer_class(
        model=model, args=settings, train_dataset=data, processing_class=loading.load_tokenizer(config.model)
    )
    trainer.train()
    logged = [line for line in trainer.state.log_history if "loss" in line]
    assert len(logged) == 3
    shared = {"loss", "grad_norm", "accuracy", "margin", "mean_reward", "kl"}
    for ours, theirs in zip(lines(config), logged, strict=True):
        names = [
            name
            for name in ours
            if name in theirs and (name in shared or name.startswith(("rewards/", "logps/")))
        ]
        assert len(names) >= 5
        if ours["step"] == 1 and stage == "dpo":
            names.remove("rewards/accuracies")  # of rewards that are zero to rounding
        assert {n: ours[n] for n in names} == pytest.approx({n: theirs[n] for n in names}, rel=1e-4, abs=1e-5)
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    assert "desirable_weight" not in options or lines(config)[2]["kl"] > 0
