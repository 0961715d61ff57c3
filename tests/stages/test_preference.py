"""Reward model, DPO and KTO on a tiny model and a few dozen rows: first losses, invariances, references, what
is saved."""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
)

from fastalign import cli, preferences
from fastalign.data import Tokenized, load_rows
from fastalign.preferences import Unpaired, tokenize_pairs, tokenize_unpaired
from fastalign.stages import build, checkpoint, dpo, kto, loop, preference, report, reward
from fastalign.stages.config import TrainConfig, describe, save_config
from fastalign.stages.world import World
from fastalign_kernels.preference.formulas import DPO_LOSS_TYPES
from fastalign_kernels.preference.losses import KTO_LOSS_TYPES
from tests.stages.tiny import (
    assert_close,
    lines,
    save_base,
    save_tokenizer,
    sentence,
    torchrun,
    weights,
    write,
)

STAGES: dict[str, tuple[ModuleType, type[TrainConfig], str]] = {
    "reward": (reward, reward.RewardConfig, "pairs"),
    "dpo": (dpo, dpo.DPOConfig, "pairs"),
    "kto": (kto, kto.KTOConfig, "judged"),
}
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A byte-level BPE tokenizer of 300 entries, pairs and judged completions."""
    folder = tmp_path_factory.mktemp("files")
    pairs = [
        {"prompt": sentence(n), "chosen": " good " + sentence(n + 50), "rejected": " bad " + sentence(n + 81)}
        for n in range(24)
    ]
    rows: dict[str, list[Any]] = {
        "pairs": pairs,
        "held_out_pairs": [row | {"prompt": row["prompt"] + " story"} for row in pairs[:7]],
        "margins": [row | {"margin": n / 8} for n, row in enumerate(pairs)],
        "judged": [
            {
                "prompt": row["prompt"],
                "completion": row["chosen"] if n % 3 else row["rejected"],
                "label": n % 3 > 0,
            }
            for n, row in enumerate(pairs)
        ],
        "held_out_judged": [
            {
                "prompt": row["prompt"] + " actor",
                "completion": row["chosen"] if n % 3 else row["rejected"],
                "label": n % 3 > 0,
            }
            for n, row in enumerate(pairs[:7])
        ],
        "two": [
            {"prompt": sentence(n), "completion": f" {word} {sentence(n + 50)}", "label": n > 0}
            for n, word in enumerate(("bad", "good"))
        ],
        "alike": [{"prompt": sentence(n), "completion": " good", "label": True} for n in range(4)],
        "bad": [pairs[0], pairs[1] | {"rejected": pairs[1]["chosen"]}],
        "bad_labels": [{"prompt": "a", "completion": " b", "label": label} for label in (True, "yes")],
    }
    paths = {name: write(folder / f"{name}.jsonl", records) for name, records in rows.items()}
    return paths | {"tokenizer": save_tokenizer(folder / "tokenizer")}


@pytest.fixture(scope="module")
def base(files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of an untrained tiny GPT-2 in fp64."""
    return save_base(tmp_path_factory.mktemp("base"), files["tokenizer"], length=64)


@pytest.fixture
def make(files: dict[str, str], base: str, tmp_path: Path) -> Make:
    """A function from a stage's name and fields to a small configuration with an output_dir of its own, in
    fp64."""
    runs = itertools.count()

    def configure(stage: str, **changes: Any) -> Any:
        _, config, data = STAGES[stage]
        values: dict[str, Any] = {
            "train_data": files[data],
            "model": base,
            "output_dir": str(tmp_path / f"run{next(runs)}"),
        }
        values |= {
            "max_length": 64,
            "batch_size": 8,
            "learning_rate": 1e-3,
            "max_steps": 1,
            "dtype": "float64",
            "device": "cpu",
        }
        return config(**(values | changes))

    return configure


def run(config: Any) -> dict[str, float]:
    stage = next(module for module, kind, _ in STAGES.values() if type(config) is kind)
    result: dict[str, float] = stage.run(config)
    return result


def close(one: TrainConfig, other: TrainConfig) -> None:
    assert_close(one, other, atol=1e-10, rel=1e-9)


def plain_logps(model: Any, sequences: list[Tokenized]) -> torch.Tensor:
    """Each sequence alone, from logits."""
    sums = []
    for ids, trained in sequences:
        logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        sums.append(sum(logp[place - 1, ids[place]] for place in range(1, len(ids)) if trained[place]))
    return torch.stack(sums)


def step_rows(config: Any, rows: list[Any], step: int) -> list[Any]:
    return [
        rows[n]
        for n in loop.rows_of_step(step, rows=len(rows), batch_size=config.batch_size, seed=config.seed)
    ]


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
    rows = tokenize_pairs(load_rows(config.train_data), build.load_tokenizer(config.model), max_length=64)
    optimizer = loop.make_optimizer(config, model)
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
    rows = tokenize_pairs(load_rows(config.train_data), build.load_tokenizer(config.model), max_length=64)
    optimizer = loop.make_optimizer(config, model)
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
    rows = tokenize_unpaired(load_rows(config.train_data), build.load_tokenizer(config.model), max_length=64)
    optimizer = loop.make_optimizer(config, model)
    for step, line in enumerate(lines(config)):
        picked = preferences.mismatch(
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


# Accumulation, ranks, packing, resume


@pytest.mark.parametrize("stage", STAGES)
def test_eight_micro_batches_of_one_equal_one_of_eight_packed_or_not(
    make: Make, files: dict[str, str], stage: str
) -> None:
    options = {"max_steps": 3, "eval_data": files[STAGES[stage][2]], "learning_rate": 1e-2}
    whole, parts, padded = (
        make(stage, **options, **more) for more in ({}, {"micro_batch_size": 1}, {"packing": False})
    )
    for config in (whole, parts, padded):
        run(config)
    close(whole, parts)
    close(whole, padded)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("reward", {}),
        ("dpo", {"lora_rank": 4}),
        ("kto", {}),
        ("dpo", {"reference": "precomputed", "gradient_checkpointing": True}),
    ],
)
def test_prompts_that_pairs_share_are_computed_once(
    make: Make,
    files: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage: str,
    options: dict[str, Any],
    attention: str,
) -> None:
    options = options | {
        "max_steps": 3,
        "eval_data": files[f"held_out_{STAGES[stage][2]}"],
        "learning_rate": 1e-2,
        "attention": attention,
    }
    tokens: list[int] = []
    forward = GPT2Model.forward

    def counted(self: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        tokens.append(input_ids.numel())
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(GPT2Model, "forward", counted)
    once, apart = make(stage, **options), make(stage, **options)
    run(once)
    assert "copy of the prompt" not in capsys.readouterr().out
    tokens_once, tokens[:] = sum(tokens), []
    monkeypatch.setattr(preference, "explain_unshared", lambda *_, **__: "a test's wish")
    run(apart)
    assert (
        capsys.readouterr().out.count(
            "packing: each sequence has its own copy of the prompt (a test's wish)\n"
        )
        == 1
    )
    # Of KTO's passes the reference's alone has pairs.
    assert tokens_once < (0.96 if stage == "kto" else 0.9) * sum(tokens)
    close(once, apart)


@pytest.mark.parametrize(
    ("stage", "options"),
    [("reward", {"lora_rank": 4}), ("dpo", {"lora_rank": 4}), ("kto", {"reference": "precomputed"})],
)
def test_two_gloo_ranks_equal_one_process(
    make: Make, files: dict[str, str], tmp_path: Path, stage: str, options: dict[str, Any]
) -> None:
    # Seven held-out rows: the ranks get unequal numbers of them.
    options = options | {
        "max_steps": 2,
        "micro_batch_size": 2,
        "eval_data": files[f"held_out_{STAGES[stage][2]}"],
        "learning_rate": 1e-2,
    }
    alone, together = make(stage, **options), make(stage, **options)
    run(alone)
    save_config(together, tmp_path / "two.yaml")
    torchrun(2, f"fastalign.stages.{stage}", "--config", str(tmp_path / "two.yaml"))
    close(alone, together)


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("reward", {}),
        ("dpo", {}),
        ("dpo", {"reference": "precomputed"}),
        ("kto", {"lora_rank": 4, "lora_dropout": 0.1}),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(
    make: Make, monkeypatch: pytest.MonkeyPatch, stage: str, options: dict[str, Any]
) -> None:
    options = options | {"max_steps": 5, "save_every": 2, "micro_batch_size": 4, "dtype": "float32"}
    whole, stopped = make(stage, **options), make(stage, **options)
    run(whole)

    class Killed(BaseException):
        """The run's process ends."""

    write = report.Report.write

    def write_until_three(self: report.Report, line: dict[str, Any]) -> None:
        write(self, line)
        if line["step"] == 3:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(report.Report, "write", write_until_three)
        with pytest.raises(Killed):
            run(stopped)
    assert checkpoint.latest(stopped.output_dir).name == "step-00000002"  # type: ignore[union-attr]
    torch.randn(3)  # what the process did before must not matter
    run(dataclasses.replace(stopped, resume=True))
    assert lines(stopped) == lines(whole)
    expected, found = weights(whole), weights(stopped)
    assert expected.keys() == found.keys() and all(
        torch.equal(expected[name], found[name]) for name in expected
    )


# References


@pytest.mark.parametrize("stage", ["dpo", "kto"])
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_the_three_references_train_alike_bitwise(
    make: Make, files: dict[str, str], stage: str, lora_rank: int
) -> None:
    # In fp32, with held-out rows, over one epoch.
    held_out = files[f"held_out_{STAGES[stage][2]}"]
    options = {
        "lora_rank": lora_rank,
        "max_steps": 3,
        "dtype": "float32",
        "eval_data": held_out,
        "learning_rate": 1e-2,
    }
    ways = ["copy", "precomputed", "adapters_off", "auto"] if lora_rank else ["copy", "precomputed", "auto"]
    runs = [make(stage, **options, reference=way) for way in ways]
    for config in runs:
        run(config)
    for config in runs[1:]:
        assert lines(config) == lines(runs[0]), config.reference
    assert abs(lines(runs[0])[-1]["rewards/margins"]) > 1e-3, "the policy must have left the reference"


def test_a_table_is_used_again_until_the_model_or_a_row_changes(
    make: Make,
    files: dict[str, str],
    tmp_path: Path,
    base: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = {"reference": "precomputed", "reference_dir": str(tmp_path / "cache"), "max_steps": 3}
    scored: list[int] = []
    score = preference._score

    def counted(model: torch.nn.Module, packed: preferences.Batch) -> torch.Tensor:
        scored.append(len(packed["sequences"]))
        return score(model, packed)

    monkeypatch.setattr(preference, "_score", counted)
    first, again = make("dpo", **options), make("dpo", **options, beta=0.5, learning_rate=1e-4)
    run(first)
    run(again)
    assert scored == [16, 16, 16] and lines(again)[0]["logps/chosen"] == lines(first)[0]["logps/chosen"]
    assert "reference: 48 sequences, 48 of them known" in capsys.readouterr().out
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 1

    rows = Path(files["pairs"]).read_text().splitlines()
    changed = json.loads(rows[3]) | {"chosen": " another one"}
    (tmp_path / "changed.jsonl").write_text("\n".join([*rows[:3], json.dumps(changed), *rows[4:]]))
    run(make("dpo", **options, train_data=str(tmp_path / "changed.jsonl")))
    assert "reference: 49 sequences, 48 of them known" in capsys.readouterr().out

    model = GPT2LMHeadModel.from_pretrained(base, dtype=torch.float64)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.bias[5] += 1e-9
    model.save_pretrained(tmp_path / "other")
    run(make("dpo", **options, model=str(tmp_path / "other"), tokenizer=files["tokenizer"]))
    assert "reference: 48 sequences, 0 of them known" in capsys.readouterr().out
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2


def test_dropout_is_off_and_the_saved_configuration_keeps_it(make: Make, base: str) -> None:
    config = make("dpo", max_steps=2)
    run(config)
    saved = AutoModelForCausalLM.from_pretrained(Path(config.output_dir, "model"))
    assert saved.config.resid_pdrop == AutoModelForCausalLM.from_pretrained(base).config.resid_pdrop == 0.1
    model = AutoModelForCausalLM.from_pretrained(base).train()
    preference.without_dropout(model)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    assert torch.equal(model(ids).logits, model(ids).logits)


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
        stage, **options, train_data=files["two" if stage == "kto" else "pairs"], batch_size=rows, max_steps=3, dtype="float32",
        schedule="constant", adam_eps=1e-6, max_grad_norm=100.0,
    )  # fmt: skip
    run(config)
    trainer_class, config_class = {
        "reward": (trl.RewardTrainer, trl.RewardConfig),
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
        "kto": (trl.KTOTrainer, trl.KTOConfig),
    }[stage]
    settings = config_class(
        output_dir=str(tmp_path / "trl"), per_device_train_batch_size=rows, max_steps=3, max_length=64, learning_rate=config.learning_rate,
        lr_scheduler_type="constant", adam_beta2=0.95, adam_epsilon=1e-6, max_grad_norm=100.0, logging_steps=1, save_strategy="no",
        bf16=False, gradient_checkpointing=False, use_cpu=True, report_to="none", disable_tqdm=True, **options,
    )  # fmt: skip
    auto = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
    torch.manual_seed(config.seed)
    model = auto.from_pretrained(
        config.model, dtype=torch.float32, **({"num_labels": 1} if stage == "reward" else {})
    )
    data = Dataset.from_list(list(load_rows(config.train_data)))
    trainer = trainer_class(
        model=model, args=settings, train_dataset=data, processing_class=build.load_tokenizer(config.model)
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


# What is trained and saved


@pytest.mark.hosts
@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_policies_learn_their_rows_and_load_as_causal_lms(
    make: Make, files: dict[str, str], stage: str
) -> None:
    config = make(
        stage, max_steps=25, eval_data=files[STAGES[stage][2]], beta=0.3, learning_rate=2e-3, dtype="float32"
    )
    result = run(config)
    assert result["eval/loss"] < 0.6 * lines(config)[0]["eval/loss"] and result["eval/rewards/margins"] > 1
    name = "pairs" if stage == "dpo" else "rows"
    assert result[name] == 25 * 8 and f"{name}_per_second" in result and "tokens" not in result
    folder = Path(config.output_dir, "model")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if stage == "dpo":
        pairs = tokenize_pairs(load_rows(config.train_data), tokenizer, max_length=64)
        with torch.no_grad():
            logps = plain_logps(model, [pair.chosen for pair in pairs]).mean().item()
        assert logps == pytest.approx(result["eval/logps/chosen"], rel=1e-5)


@pytest.mark.hosts
def test_a_reward_model_learns_its_pairs_and_scores_a_padded_batch_as_transformers_does(
    make: Make, files: dict[str, str]
) -> None:
    config = make("reward", max_steps=25, eval_data=files["pairs"], learning_rate=1e-3, dtype="float32")
    result = run(config)
    assert result["eval/accuracy"] == 1.0 and result["eval/loss"] < 0.2
    folder = Path(config.output_dir, "model")
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert isinstance(model, GPT2ForSequenceClassification) and model.config.num_labels == 1
    assert model.config.pad_token_id == tokenizer.pad_token_id
    rows = [json.loads(line) for line in Path(files["pairs"]).read_text().splitlines()]
    means = []
    for side in ("chosen", "rejected"):
        batch = tokenizer(
            [row["prompt"] + row[side] + tokenizer.eos_token for row in rows],
            padding=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            means.append(
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
                .logits.mean()
                .item()
            )
    assert means[0] - means[1] == pytest.approx(result["eval/margin"], rel=1e-4)


@pytest.mark.hosts
@pytest.mark.parametrize("stage", STAGES)
def test_lora_trains_the_adapters_and_they_load_on_the_base(make: Make, base: str, stage: str) -> None:
    config = make(stage, lora_rank=4, max_steps=12, learning_rate=1e-2, dtype="float32")
    run(config)
    losses = [line["loss"] for line in lines(config)]
    assert losses[-1] < losses[0]
    folder = Path(config.output_dir, "model")
    adapters = weights(config)
    assert all("lora_" in name or (stage == "reward" and "score" in name) for name in adapters)
    assert not (folder / "model.safetensors").exists()
    options = {"num_labels": 1} if stage == "reward" else {}
    auto = AutoPeftModelForSequenceClassification if stage == "reward" else AutoPeftModelForCausalLM
    loaded = auto.from_pretrained(folder, **options).eval()
    assert any(weight.abs().max() > 0 for name, weight in loaded.named_parameters() if "lora_B" in name)


def test_centring_draws_the_scores_to_zero(make: Make) -> None:
    plain, centred = (
        make("reward", max_steps=10, center_coefficient=weight, learning_rate=1e-3) for weight in (0.0, 1.0)
    )
    assert abs(run(centred)["mean_reward"]) < abs(run(plain)["mean_reward"])


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("options", [{"bf16": True}, {"gradient_checkpointing": True}])
def test_the_ways_to_save_memory_train(make: Make, stage: str, options: dict[str, Any]) -> None:
    plain, changed = (
        make(stage, max_steps=2, dtype="float32", lora_rank=2, **more) for more in ({}, options)
    )
    run(plain)
    run(changed)
    tolerance = 0.05 if "bf16" in options else 1e-6
    for one, other in zip(lines(plain), lines(changed), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=tolerance)


# Refusals


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("dpo", {"loss_type": "sigmod"}, "loss_type"),
        (
            "dpo",
            {"label_smoothing": 0.1, "loss_type": "hinge"},
            "label_smoothing: 0.1 seen with loss_type='hinge'",
        ),
        ("dpo", {"loss_type": "exo_pair"}, "label_smoothing: 0.0 seen with loss_type='exo_pair'"),
        ("dpo", {"beta": 0}, "beta"),
        ("dpo", {"reference": "adapters_off"}, r"reference: adapters_off needs adapters \(lora_rank > 0\)"),
        ("kto", {"reference_dir": "x"}, r"reference_dir \('x'\) needs reference=precomputed, not auto"),
        ("kto", {"batch_size": 1}, "batch_size must be at least 2: .* another row of its step; got 1"),
        ("kto", {"desirable_weight": -1}, "desirable_weight"),
        ("reward", {"center_coefficient": -1}, "center_coefficient"),
        ("reward", {"beta": 0.1}, "unknown key 'beta'"),
        ("reward", {"tail_eps": 0.01}, r"tail_eps \(0.01\) is for a softmax"),
        ("dpo", {"tail_eps": 1.0}, "tail_eps"),
    ],
)
def test_a_wrong_configuration_is_refused_by_name(
    make: Make, stage: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(stage, **changes)


def test_rows_that_cannot_be_used_are_refused_before_the_model_loads(
    make: Make, files: dict[str, str], no_model: None
) -> None:
    for stage in ("reward", "dpo"):
        with pytest.raises(
            ValueError, match=r"bad\.jsonl, row 2: columns 'chosen' and 'rejected' are the same"
        ):
            run(make(stage, train_data=files["bad"]))
        with pytest.raises(ValueError, match=r"judged\.jsonl: no column 'chosen' and no column 'rejected'"):
            run(make(stage, train_data=files["judged"]))
    with pytest.raises(
        ValueError, match=r"bad_labels\.jsonl, row 2: column 'label' must be true or false, got 'yes'"
    ):
        run(make("kto", train_data=files["bad_labels"]))
    with pytest.raises(
        ValueError,
        match=r"batch_size \(8\): all rows of step 1 have the same completion.* 1 of the 4 rows' completions",
    ):
        run(make("kto", train_data=files["alike"]))
    with pytest.raises(
        ValueError, match="eval_data: rows must have two different completions at least.* got 4 rows of one"
    ):
        run(make("kto", eval_data=files["alike"]))


def test_the_loss_types_are_the_kernels() -> None:
    assert get_args(dpo.DPOConfig.__annotations__["loss_type"]) == DPO_LOSS_TYPES
    assert get_args(kto.KTOConfig.__annotations__["loss_type"]) == KTO_LOSS_TYPES


@pytest.mark.parametrize("loss_type", DPO_LOSS_TYPES)
def test_every_loss_of_pairs_trains(make: Make, loss_type: str) -> None:
    smoothing = 0.1 if loss_type == "exo_pair" else 0.0
    config = make("dpo", max_steps=2, loss_type=loss_type, label_smoothing=smoothing, learning_rate=1e-4)
    run(config)
    assert all(line["grad_norm"] > 0 for line in lines(config))


def test_a_model_that_packs_wrongly_is_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    check = build.check_packing

    def noted(model: Any, **options: Any) -> None:
        asked.append(type(model).__name__)
        check(model, **options)

    monkeypatch.setattr(build, "check_packing", noted)
    for stage in STAGES:
        run(make(stage))
        run(make(stage, packing=False))
    assert asked == ["GPT2Model", "GPT2LMHeadModel", "GPT2LMHeadModel"]


@pytest.mark.parametrize("stage", STAGES)
def test_every_field_is_described_and_the_command_shows_it(
    stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = STAGES[stage][1]
    for kind in config.__mro__:
        own = getattr(kind, "__pydantic_fields__", {})
        assert not [
            name for name in getattr(kind, "__annotations__", {}) if name in own and not own[name].description
        ]
    with pytest.raises(SystemExit):
        cli.main([stage, "--help"])
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: fastalign {stage}") and describe(config) in shown
    assert stage == "reward" or "learning_rate: float (> 0) = 1.0e-06" in shown


def test_world_places_batches_within_batches() -> None:
    world = World(0, 1, torch.device("meta"))
    placed = world.place({"a": {"b": torch.ones(2), "c": (1,)}, "d": 3})
    assert placed["a"]["b"].is_meta and placed["a"]["c"] == (1,) and placed["d"] == 3
