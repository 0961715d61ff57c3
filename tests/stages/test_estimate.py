"""What a stage says before its first step: parameters, tokens, steps, and memory beside the peak that is
measured; and dry runs."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fastalign.measure import peak_memories
from fastalign.stages import dpo, estimate, grpo, kto, ppo, pretrain, reward, sft
from fastalign.stages.estimate import Estimate, Part, Shape
from fastalign.stages.models.loading import load_tokenizer, scratch_config
from fastalign.stages.runs.distributed import World
from tests.stages.memory import STAGES
from tests.stages.tiny import LLAMA, save_base, save_tokenizer, sentence, write

CPU = World(0, 1, torch.device("cpu"))
WIDE = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 4}
LONG = WIDE | {"hidden_size": 128, "intermediate_size": 384, "vocab_size": 8192}
LARGE = WIDE | {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 16384}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tokenizer, a base, and rows for every stage, 32 of each."""
    folder = tmp_path_factory.mktemp("data")
    tokenizer = save_tokenizer(folder / "tokenizer")
    chosen, rejected = (lambda n: " good " + sentence(n) * 5), (lambda n: " bad " + sentence(n + 9) * 5)
    prompts = [" ".join(sentence(n + k) for k in range(10)) for n in range(32)]
    rows: dict[str, list[Any]] = {
        "text": [{"text": " ".join(sentence(n + k) for k in range(40))} for n in range(32)],
        "demonstrations": [{"prompt": prompts[n], "completion": chosen(n)} for n in range(32)],
        "pairs": [{"prompt": prompts[n], "chosen": chosen(n), "rejected": rejected(n)} for n in range(32)],
        "judged": [{"prompt": prompts[n], "completion": chosen(n), "label": n % 2 == 0} for n in range(32)],
        "prompts": [{"prompt": sentence(n)} for n in range(32)],
    }
    paths = {name: write(folder / f"{name}.jsonl", records) for name, records in rows.items()}
    base = save_base(folder / "base", tokenizer, length=512, n_embd=256, n_layer=4, n_head=4)
    (folder / "score.py").write_text(
        "def score(prompts, completions):\n    return [float(len(text)) for text in completions]\n"
    )
    return paths | {"tokenizer": tokenizer, "base": base, "score": f"{folder}/score.py:score"}


def fields_of(stage: str, data: dict[str, str], output_dir: Path, **changes: Any) -> dict[str, Any]:
    names = {
        "pretrain": "text",
        "sft": "demonstrations",
        "kto": "judged",
        "ppo": "prompts",
        "grpo": "prompts",
    }
    fields: dict[str, Any] = {
        "train_data": data[names.get(stage, "pairs")],
        "output_dir": str(output_dir),
        "device": "cpu",
        "max_steps": 2,
    }
    fields |= {"tokenizer": data["tokenizer"]} if stage == "pretrain" else {"model": data["base"]}
    fields |= {"reward": data["score"], "max_new_tokens": 8} if stage in ("ppo", "grpo") else {}
    return fields | {"batch_size": 8} | changes


@pytest.fixture
def totals(monkeypatch: pytest.MonkeyPatch) -> list[Estimate]:
    """The estimates that stages print."""
    found: list[Estimate] = []
    line = estimate._memory_line

    def noted(total: Estimate, free: int | None, world: World) -> str:
        found.append(total)
        return line(total, free, world)

    monkeypatch.setattr(estimate, "_memory_line", noted)
    return found


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="this system does not tell a process its peak memory"
)
def test_the_estimate_lies_near_the_measured_peak(
    data: dict[str, str], tmp_path: Path, totals: list[Estimate]
) -> None:
    """Between 0.75 and 1.5 times: what a step keeps is counted, what kernels take for moments is not."""
    runs: list[tuple[str, dict[str, Any]]] = [
        ("pretrain", {"model_config": LONG, "sequence_length": 256, "batch_size": 16}),  # activations
        ("pretrain", {"model_config": LARGE, "sequence_length": 64, "batch_size": 2}),  # weights
        ("dpo", {"max_length": 512, "lora_rank": 8}),  # adapters on a frozen base
    ]
    calls = []
    for number, (stage, changes) in enumerate(runs):
        fields = fields_of(stage, data, tmp_path / f"run{number}", **changes)
        kind, run = STAGES[stage]
        run(kind(**fields, dry_run=True))
        calls.append({"stage": stage, "fields": json.dumps(fields)})
    small = {"model_config": LLAMA, "sequence_length": 32}
    warmup = {
        "stage": "pretrain",
        "fields": json.dumps(fields_of("pretrain", data, tmp_path / "warm", **small)),
    }
    peaks = peak_memories("tests.stages.memory:prepare", calls, warmup=warmup)
    for (stage, changes), total, peak in zip(runs, totals, peaks, strict=True):
        assert 0.75 < total.total / 2**20 / peak < 1.5, (stage, changes, total, peak)


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "dpo", "kto", "ppo", "grpo"])
def test_a_dry_run_says_what_the_run_takes_and_leaves_nothing(
    stage: str,
    data: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for auto in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        monkeypatch.setattr(auto, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    changes = {"model_config": LLAMA, "sequence_length": 64} if stage == "pretrain" else {}
    modules = {"pretrain": pretrain, "sft": sft, "reward": reward, "dpo": dpo, "kto": kto, "ppo": ppo}
    (modules | {"grpo": grpo})[stage].main(
        [
            f"{name}={json.dumps(value) if isinstance(value, dict) else value}"
            for name, value in fields_of(stage, data, tmp_path / "out", dry_run="true", **changes).items()
        ]
    )
    shown = capsys.readouterr().out
    assert re.search(r"^model: [\d,]+ parameters, [\d,]+ of them trained$", shown, re.MULTILINE)
    assert re.search(r"^data: \d+ rows; 2 steps of 8, about [\d,]+ tokens each$", shown, re.MULTILINE)
    assert re.search(
        r"^memory: about [\d.]+ GiB a step \(weights .*, gradients .*, AdamW .*, activations .*, head .*\), "
        r"[\d.]+ GiB free on cpu$",
        shown,
        re.M,
    )  # noqa: E501
    assert ("reference: " in shown) == (stage in ("dpo", "kto", "ppo")) and ("value model: " in shown) == (
        stage == "ppo"
    )
    assert "warning" not in shown and not (tmp_path / "out").exists()


def test_rows_fewer_than_a_batch_and_memory_that_does_not_do_are_warned_of(
    data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(estimate, "free_memory", lambda world: 2**20)
    sft.run(sft.SFTConfig(**fields_of("sft", data, tmp_path / "out", dry_run=True, batch_size=33)))
    shown = capsys.readouterr().out
    assert (
        "warning: batch_size: got 33, expected at most the 32 rows: a step takes some of them more than once"
        in shown
    )
    assert re.search(
        r"warning: memory: a step is estimated to take [\d.]+ GiB and 0.00 GiB are free: lower "
        r"micro_batch_size",
        shown,
    )


def test_the_estimate_counts_parameters_as_the_model_has_them(data: dict[str, str], tmp_path: Path) -> None:
    config = pretrain.PretrainConfig(**fields_of("pretrain", data, tmp_path, model_config=LLAMA))
    architecture = scratch_config(LLAMA, load_tokenizer(data["tokenizer"]), length=64)
    found = estimate.estimate(
        config, CPU, Part("model", architecture), Shape(2, 64, 126, masked=False), upstream="scalar"
    )
    whole = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(architecture).parameters())
    assert found[:5] == (whole, whole, 4 * whole, 4 * whole, 8 * whole)


def test_a_model_that_cannot_be_traced_is_said_and_does_not_end_the_run(
    data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import GPT2Model

    def forward(self: Any, input_ids: torch.Tensor, **_: Any) -> None:
        raise RuntimeError(f"{int(input_ids.sum())}")

    monkeypatch.setattr(GPT2Model, "forward", forward)
    sft.run(sft.SFTConfig(**fields_of("sft", data, tmp_path / "out", dry_run=True)))
    assert (
        "; activations not counted (GPT2LMHeadModel cannot be traced: DataDependentOutputException)"
        in capsys.readouterr().out
    )


def test_the_tightest_cgroup_counts_less_what_it_holds_and_with_its_page_cache(tmp_path: Path) -> None:
    (tmp_path / "membership").write_text("0::/outer/inner\n")
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    limits: dict[str, tuple[str, str, str]] = {
        "outer": ("1000", "700", "anon 1\ninactive_file 50"),
        "outer/inner": ("max", "600", ""),
    }
    for folder, (most, now, stat) in limits.items():
        for name, text in {"memory.max": most, "memory.current": now, "memory.stat": stat}.items():
            (tmp_path / folder / name).write_text(text + "\n")
    assert estimate._cgroup_left(tmp_path, tmp_path / "membership") == 350
    shutil.rmtree(tmp_path / "outer")
    assert estimate._cgroup_left(tmp_path, tmp_path / "membership") is None


def test_memory_that_the_system_does_not_tell_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert estimate._cgroup_left(tmp_path, tmp_path / "absent") is None
    read = Path.read_text

    def without_proc(path: Path, *arguments: Any, **options: Any) -> str:
        if path.parts[:2] == ("/", "proc"):
            raise FileNotFoundError(path)
        return read(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", without_proc)
    assert estimate.free_memory(CPU) is None
