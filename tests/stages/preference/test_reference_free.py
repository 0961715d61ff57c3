"""ORPO, SimPO and CPO by `fastalign dpo`: no reference, plain PyTorch's numbers, and TRL's."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from fastalign.data import load_rows, tokenize_pairs
from fastalign.stages import dpo, optimization
from fastalign.stages.models import loading
from tests.stages.preference.runs import OURS_AS_TRL, Make, plain_logps, run, step_rows, trl_settings
from tests.stages.tiny import lines, write


def by_hand(config: Any, logps: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean loss of pairs and the rewards, from sums over tokens, the chosen completions first."""
    means = logps / lengths
    if config.loss_type == "orpo":
        chosen, rejected = (means - torch.log1p(-means.exp())).chunk(2)
        return (
            -means.chunk(2)[0] - config.beta * F.logsigmoid(chosen - rejected)
        ).mean(), config.beta * means
    if config.loss_type == "simpo":
        chosen, rejected = means.chunk(2)
        margin = config.beta * (chosen - rejected) - config.gamma
        return (-F.logsigmoid(margin) - config.alpha * chosen).mean(), config.beta * means
    chosen, rejected = logps.chunk(2)
    margin, e = config.beta * (chosen - rejected), config.label_smoothing
    nll = -(means if config.nll_mean else logps).chunk(2)[0]
    losses = -(1 - e) * F.logsigmoid(margin) - e * F.logsigmoid(-margin) + config.alpha * nll
    return losses.mean(), config.beta * logps


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "orpo", "beta": 0.3},
        {"loss_type": "simpo", "beta": 2.0, "gamma": 0.7, "alpha": 0.5},
        {"loss_type": "cpo", "beta": 0.2, "alpha": 1.0, "label_smoothing": 0.1},
        {"loss_type": "cpo", "beta": 0.2, "alpha": 0.5, "nll_mean": True},
    ],
)
def test_steps_are_plain_pytorchs_and_take_no_reference(
    make: Make, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: Any, **given: Any) -> None:
        pytest.fail("a reference was made")

    monkeypatch.setattr(dpo, "make_reference", refuse)
    config = make("dpo", max_steps=2, micro_batch_size=4, max_grad_norm=None, **options)
    run(config)
    assert "reference: " not in capsys.readouterr().err
    model = GPT2LMHeadModel.from_pretrained(config.model, dtype=torch.float64).eval()
    rows = tokenize_pairs(load_rows(config.train_data), loading.load_tokenizer(config.model), max_length=64)
    optimizer = optimization.make_optimizer(config, model)
    for step, line in enumerate(lines(config)):
        pairs = step_rows(config, rows, step)
        sequences = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        logps = plain_logps(model, sequences)
        loss, rewards = by_hand(config, logps, torch.tensor([sum(trained) for _, trained in sequences]))
        loss.backward()
        chosen, rejected = rewards.chunk(2)
        expected = {
            "loss": loss,
            "grad_norm": torch.nn.utils.get_total_norm(
                [weight.grad for weight in model.parameters() if weight.grad is not None]
            ),
            "rewards/chosen": chosen.mean(),
            "rewards/margins": (chosen - rejected).mean(),
            "rewards/accuracies": (chosen > rejected).double().mean(),
            "logps/rejected": logps.chunk(2)[1].mean(),
        }
        assert {name: line[name] for name in expected} == pytest.approx(
            {name: value.item() for name, value in expected.items()}, rel=1e-6
        )
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = line["learning_rate"]
        optimizer.step()
        optimizer.zero_grad()


def test_numbers_that_are_not_given_are_those_of_the_loss(make: Make) -> None:
    given = {"orpo": {"beta": 0.1, "alpha": 1.0}, "simpo": {"beta": 2.0, "gamma": 1.0, "alpha": 0.0}}
    given |= {"cpo": {"beta": 0.1, "alpha": 1.0}, "sigmoid": {"beta": 0.1}}
    for loss_type, options in given.items():
        with_defaults, explicit = (
            make("dpo", loss_type=loss_type),
            make("dpo", loss_type=loss_type, **options),
        )
        assert run(with_defaults)["loss"] == run(explicit)["loss"]


@pytest.mark.parametrize(
    ("loss_type", "ours", "theirs"),
    [
        ("cpo", {"beta": 0.3, "alpha": 0.0, "label_smoothing": 0.1}, {"cpo_alpha": 0.0}),
        ("cpo", {"beta": 0.3, "alpha": 0.7, "nll_mean": True}, {"cpo_alpha": 0.7}),
        (
            "simpo",
            {"beta": 2.0, "gamma": 0.5, "alpha": 0.7},
            {"loss_type": "simpo", "simpo_gamma": 0.5, "cpo_alpha": 0.7},
        ),
        ("orpo", {"beta": 0.3}, {}),
    ],
)
def test_the_first_steps_are_trls(
    make: Make, tmp_path: Path, loss_type: str, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    pytest.importorskip("trl", reason="trl is not installed")
    kind = "ORPO" if loss_type == "orpo" else "CPO"
    trl = importlib.import_module(f"trl.experimental.{kind.lower()}")
    # TRL's NLL is a mean over the tokens of all chosen completions, ORPO's over the prompts' tokens too. Ours
    # is one over pairs. They agree where completions have one length and prompts are one token.
    pairs = [
        {"prompt": "z", "chosen": f" {a}{b}", "rejected": f" {b}{a}{c}"}
        for a, b, c in ("xqj", "qjx", "jxx", "kqx", "qkk", "xkj", "jkq", "kxj")
    ]
    data = write(tmp_path / "pairs.jsonl", pairs)
    config = make(
        "dpo",
        **ours,
        loss_type=loss_type,
        train_data=data,
        **OURS_AS_TRL,
    )
    run(config)
    settings = getattr(trl, f"{kind}Config")(
        **trl_settings(config, tmp_path / "trl", len(pairs)),
        beta=config.beta,
        **theirs | ({"label_smoothing": config.label_smoothing} if config.label_smoothing else {}),
    )
    trainer = getattr(trl, f"{kind}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32),
        args=settings,
        train_dataset=Dataset.from_list(pairs),
        processing_class=loading.load_tokenizer(config.model),
    )
    trainer.train()
    logged = [line for line in trainer.state.log_history if "loss" in line]
    names = ["loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/accuracies"]
    for line, expected in zip(lines(config), logged, strict=True):
        assert {name: line[name] for name in names} == pytest.approx(
            {name: expected[name] for name in names}, rel=1e-4, abs=1e-5
        )
