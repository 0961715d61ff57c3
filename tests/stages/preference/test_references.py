"""The three references, their table, and resumes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2LMHeadModel,
)

from fastalign.data import sequence_batches
from fastalign.stages import packers
from fastalign.stages.models import reference_model
from fastalign.stages.runs import checkpoint, reporters
from tests.stages.preference.runs import STAGES, Make, run
from tests.stages.tiny import (
    lines,
    weights,
)


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

    write = reporters.Report.write

    def write_until_three(self: reporters.Report, line: dict[str, Any]) -> None:
        write(self, line)
        if line["step"] == 3:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(reporters.Report, "write", write_until_three)
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
    references = (
        ["copy", "precomputed", "adapters_off", "auto"] if lora_rank else ["copy", "precomputed", "auto"]
    )
    runs = [make(stage, **options, reference=reference) for reference in references]
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
    score = reference_model._score

    def counted(model: torch.nn.Module, packed: sequence_batches.Batch) -> torch.Tensor:
        scored.append(len(packed["sequences"]))
        return score(model, packed)

    monkeypatch.setattr(reference_model, "_score", counted)
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
    packers.without_dropout(model)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    assert torch.equal(model(ids).logits, model(ids).logits)
