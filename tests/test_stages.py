"""The training loop and its two first stages, on a tiny Llama and a few dozen rows."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fastalign import data
from fastalign.stages import build, checkpoint, loop, pretrain, report, sft
from fastalign.stages.config import TrainConfig, read_config, save_config
from fastalign.stages.world import World

WORDS = [
    "the",
    "a",
    "film",
    "story",
    "actor",
    "is",
    "was",
    "good",
    "bad",
    "dull",
    "bright",
    "and",
    "but",
    "never",
]
WALL_CLOCK = ("seconds", "tokens_per_second")
LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.2}
GPT2 |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}


def sentence(number: int) -> str:
    """Ragged on purpose: 3 to 14 words."""
    return " ".join(WORDS[(number * 7 + 5 * place * place) % len(WORDS)] for place in range(3 + number * 5 % 12))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A byte-level BPE tokenizer of 300 entries, text and demonstrations."""
    folder = tmp_path_factory.mktemp("files")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(map(sentence, range(40)), vocab_size=300, special_tokens=["<eos>", "<pad>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>", pad_token="<pad>")
    tokenizer.save_pretrained(folder / "tokenizer")
    rows = {
        "text": [{"text": sentence(number)} for number in range(40)],
        "held_out": [{"text": sentence(number)} for number in range(100, 107)],
        "pairs": [{"prompt": sentence(n), "completion": " " + sentence(n + 50)} for n in range(24)],
        "long": [{"prompt": sentence(1), "completion": " film" * 80}],
        "bad": [{"prompt": "x", "completion": " y"}, {"prompt": "x", "completion": ""}],
    }
    for name, records in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return {name: str(folder / f"{name}.jsonl") for name in rows} | {"tokenizer": str(folder / "tokenizer")}


@pytest.fixture(scope="module")
def base(files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of an untrained tiny GPT-2 in fp64 (Llama's norms are fp32 whatever the dtype)."""
    folder = str(tmp_path_factory.mktemp("base"))
    tokenizer = build.load_tokenizer(files["tokenizer"])
    torch.manual_seed(3)
    architecture = build.scratch_config(GPT2, tokenizer, length=64)
    AutoModelForCausalLM.from_config(architecture, dtype=torch.float64).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def pretraining(files: dict[str, str], tmp_path: Path) -> Callable[..., pretrain.PretrainConfig]:
    """A function that makes small pre-training configurations, each with an output_dir of its own."""
    runs = itertools.count()

    def make(**changes: Any) -> pretrain.PretrainConfig:
        values: dict[str, Any] = {
            "train_data": files["text"],
            "eval_data": files["held_out"],
            "tokenizer": files["tokenizer"],
        }
        values |= {"model_config": LLAMA, "output_dir": str(tmp_path / f"run{next(runs)}"), "device": "cpu"}
        values |= {"sequence_length": 40, "batch_size": 4, "learning_rate": 1e-2, "max_steps": 7}
        return pretrain.PretrainConfig(**(values | changes))

    return make


@pytest.fixture
def tuning(files: dict[str, str], base: str, tmp_path: Path) -> Callable[..., sft.SFTConfig]:
    """The same for supervised fine-tuning of `base`, in fp64."""
    runs = itertools.count()

    def make(**changes: Any) -> sft.SFTConfig:
        values: dict[str, Any] = {
            "train_data": files["pairs"],
            "model": base,
            "output_dir": str(tmp_path / f"sft{next(runs)}"),
        }
        values |= {"max_length": 64, "batch_size": 8, "learning_rate": 1e-3, "max_steps": 1}
        values |= {"dtype": "float64", "device": "cpu"}
        return sft.SFTConfig(**(values | changes))

    return make


def weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output_dir, "model", "model.safetensors"))


def lines(config: TrainConfig) -> list[dict[str, Any]]:
    """metrics.jsonl without what the clock says."""
    parsed = [json.loads(line) for line in Path(config.output_dir, "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in WALL_CLOCK} for line in parsed]


def recorded(stage: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[torch.nn.Module]:
    """Collects the models that the stage's runs load from now on."""
    built: list[torch.nn.Module] = []

    def load_model(*arguments: Any, **options: Any) -> torch.nn.Module:
        built.append(build.load_model(*arguments, **options))
        return built[-1]

    monkeypatch.setattr(stage, "load_model", load_model)
    return built


# Resume


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(
    pretraining: Callable[..., pretrain.PretrainConfig],
    monkeypatch: pytest.MonkeyPatch,
    micro_batch_size: int | None,
) -> None:
    # Dropout makes the random states matter; step 4 of 4 rows in 11 or so ends in the middle of an epoch.
    options: dict[str, Any] = {
        "model_config": LLAMA | {"attention_dropout": 0.2},
        "save_every": 4,
        "eval_every": 3,
    }
    options |= {"micro_batch_size": micro_batch_size, "warmup_steps": 2}
    whole = pretraining(**options)
    pretrain.run(whole)

    class Killed(BaseException):
        """The run's process ends."""

    write = report.Report.write

    def write_until_six(self: report.Report, line: dict[str, Any]) -> None:
        write(self, line)
        if line["step"] == 6:
            raise Killed

    stopped = pretraining(**options)
    with monkeypatch.context() as patch:
        patch.setattr(report.Report, "write", write_until_six)
        with pytest.raises(Killed):
            pretrain.run(stopped)
    assert [line["step"] for line in lines(stopped)] == [
        0,
        1,
        2,
        3,
        4,
        5,
        6,
    ]  # 5 and 6 are after the checkpoint
    assert checkpoint.latest(stopped.output_dir).name == "step-00000004"  # type: ignore[union-attr]
    rows = lines(whole)[-1]["step"] * 4 / lines(whole)[-1]["epoch"]
    assert 4 * 4 % rows != 0, "step 4 must not be an epoch's end"

    with Path(stopped.output_dir, "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # killed while writing
    resumed = dataclasses.replace(stopped, resume=True)
    torch.randn(3)  # what the process did before must not matter
    result = pretrain.run(resumed)

    assert lines(resumed) == lines(whole)
    assert result["step"] == 7
    expected, found = weights(whole), weights(resumed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_dropout_noise_is_what_the_resume_test_restores(
    pretraining: Callable[..., pretrain.PretrainConfig],
) -> None:
    # Without this, the test above could pass with random states that are never restored.
    with_noise = pretraining(model_config=LLAMA | {"attention_dropout": 0.2}, max_steps=2)
    without = pretraining(max_steps=2)
    pretrain.run(with_noise)
    pretrain.run(without)
    assert lines(with_noise)[0] == lines(without)[0]  # evaluation draws none
    assert lines(with_noise)[1]["loss"] != lines(without)[1]["loss"]


def test_resume_refuses_another_place_in_the_data_and_says_what_else_changed(
    pretraining: Callable[..., pretrain.PretrainConfig],
    files: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = pretraining(max_steps=2, save_every=2)
    pretrain.run(first)
    again = {"output_dir": first.output_dir, "resume": True}
    for name, value in (("seed", 1), ("batch_size", 2), ("train_data", files["held_out"])):
        with pytest.raises(ValueError, match=rf"resume: {name} is .*{value!r}.* was started with"):
            pretrain.run(pretraining(**again | {name: value}))
    with pytest.raises(ValueError, match=r"resume: rows is \d+, and the run .* was started with \d+"):
        pretrain.run(pretraining(**again, sequence_length=64))
    with pytest.raises(ValueError, match=r"the model and .* differ in .*layers\.2"):
        pretrain.run(pretraining(**again, model_config=LLAMA | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match="already holds a run; continue it with resume=true"):
        pretrain.run(pretraining(output_dir=first.output_dir))
    capsys.readouterr()
    pretrain.run(pretraining(**again, max_steps=3, learning_rate=2e-2))
    printed = capsys.readouterr().out
    assert "resuming with learning_rate=0.02 (before: 0.01)" in printed
    assert "resuming with max_steps=3 (before: 2)" in printed
    assert [line["step"] for line in lines(first)] == [0, 1, 2, 3]


def test_resume_without_a_checkpoint_starts_at_step_0_and_says_so(
    pretraining: Callable[..., pretrain.PretrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    config = pretraining(max_steps=1, resume=True)
    Path(config.output_dir).mkdir()
    Path(config.output_dir, "metrics.jsonl").write_text('{"step": 1, "loss": 7.0}\n{"step": 2, "lo')
    pretrain.run(config)
    assert "no checkpoint" in capsys.readouterr().out
    assert [line["step"] for line in lines(config)] == [0, 1]


def test_a_finished_run_resumes_to_itself(pretraining: Callable[..., pretrain.PretrainConfig]) -> None:
    config = pretraining(max_steps=2, save_every=1)
    result = pretrain.run(config)
    before, metrics = weights(config), lines(config)
    assert pretrain.run(dataclasses.replace(config, resume=True)) == result
    assert lines(config) == metrics
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(config).items())


def test_the_last_checkpoints_stay_and_a_kill_while_writing_leaves_none_in_halves(
    pretraining: Callable[..., pretrain.PretrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = pretraining(save_every=1, keep_checkpoints=2, max_steps=5)
    saved = torch.save

    def killed_at_step_5(value: Any, path: Path) -> None:
        if "step" in value and value["step"] == 5:
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt
        saved(value, path)

    monkeypatch.setattr(torch, "save", killed_at_step_5)
    with pytest.raises(KeyboardInterrupt):
        pretrain.run(config)
    folder = Path(config.output_dir, "checkpoints")
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-00000003", "step-00000004"]
    monkeypatch.undo()
    pretrain.run(dataclasses.replace(config, resume=True))
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000004", "step-00000005"]


# Accumulation and ranks


def test_eight_micro_batches_of_one_equal_one_of_eight(tuning: Callable[..., sft.SFTConfig]) -> None:
    whole, parts = tuning(max_steps=2), tuning(max_steps=2, micro_batch_size=1)
    sft.run(whole)
    sft.run(parts)
    assert ragged_targets(whole), "the rows must differ in their numbers of targets"
    close(weights(whole), weights(parts), lines(whole), lines(parts))


def ragged_targets(config: sft.SFTConfig) -> bool:
    rows = data.tokenize_sft(data.load_rows(config.train_data), build.load_tokenizer(config.model), max_length=config.max_length)
    return len({sum(row.trained) for row in rows}) > 5


def close(
    expected: dict[str, torch.Tensor],
    found: dict[str, torch.Tensor],
    expected_lines: list[dict[str, Any]],
    found_lines: list[dict[str, Any]],
) -> None:
    """fp64 to 1e-10. A wrong scale of the loss hardly moves AdamW, but the logged gradient norm shows it."""
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-10)
    assert len(found_lines) == len(expected_lines)
    for one, other in zip(found_lines, expected_lines, strict=True):
        assert one == pytest.approx(other, rel=1e-10, abs=1e-10)


def test_two_gloo_ranks_equal_one_process(tuning: Callable[..., sft.SFTConfig], files: dict[str, str], tmp_path: Path) -> None:
    options: dict[str, Any] = {"micro_batch_size": 2, "eval_data": files["pairs"], "schedule": "constant"}
    options |= {"max_grad_norm": 0.5, "save_every": 2}
    alone, together = tuning(**options, max_steps=3), tuning(**options, max_steps=2)
    sft.run(alone)
    save_config(together, tmp_path / "two.yaml")
    torchrun(2, "fastalign.stages.sft", "--config", str(tmp_path / "two.yaml"))
    found = checkpoint.latest(together.output_dir)
    assert found is not None
    assert sorted(path.name for path in found.iterdir()) == ["random-0.pt", "random-1.pt", "state.pt"]

    # The third step on one process shows that their checkpoint is good too.
    with pytest.warns(UserWarning, match="resuming on 1 processes a run of 2"):
        sft.run(dataclasses.replace(together, max_steps=3, resume=True))
    # The run of two steps evaluated at its end, and that of three did not there.
    close(weights(alone), weights(together), lines(alone), [without_eval(line, 2) for line in lines(together)])


def without_eval(line: dict[str, Any], step: int) -> dict[str, Any]:
    return {name: value for name, value in line.items() if line["step"] != step or not name.startswith("eval/")}


def torchrun(processes: int, module: str, *arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*command, "-m", module, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_rank_gets_its_own_rows_and_all_get_each_once() -> None:
    config = TrainConfig(train_data="x", output_dir="x", batch_size=6, micro_batch_size=1, seed=5)
    rows = list(range(9))
    seen = []
    for step in range(3):  # 18 rows: two epochs
        ranks = []
        for rank in range(2):
            world = World(rank, 2, torch.device("cpu"))
            batches_of = loop.epoch_batches(rows, lambda picked: {"rows": list(picked)}, config, world)
            batches = batches_of(step)
            assert len(batches) == 3
            ranks.append([row for batch in batches for row in batch["rows"]])
        assert not set(ranks[0]) & set(ranks[1]) or step == 1  # step 1 takes from two epochs
        seen += ranks[0] + ranks[1]
    assert sorted(seen) == sorted(rows * 2)
    first, second = ([loop.rows_of_step(s, rows=9, batch_size=9, seed=5) for s in range(2)] for _ in range(2))
    assert first == second and first[0] != first[1]
    assert first[0] != loop.rows_of_step(0, rows=9, batch_size=9, seed=6)


def test_held_out_rows_are_shared_without_loss_or_repetition() -> None:
    config = TrainConfig(train_data="x", output_dir="x", batch_size=4, micro_batch_size=2)
    shares = []
    for rank in range(2):
        world = World(rank, 2, torch.device("cpu"))
        batches = loop.held_out_batches(list(range(7)), lambda picked: {"rows": list(picked)}, config, world)
        assert all(len(batch["rows"]) <= 2 for batch in batches)
        shares.append([row for batch in batches for row in batch["rows"]])
    assert sorted(shares[0] + shares[1]) == list(range(7))
    with pytest.raises(ValueError, match="eval_data: 1 rows for 2 devices"):
        loop.held_out_batches([0], lambda picked: {"rows": picked}, config, World(0, 2, torch.device("cpu")))


# What is trained, and what is left on disk


def test_a_memorisable_set_is_memorised_and_the_saved_model_is_that_model(
    pretraining: Callable[..., pretrain.PretrainConfig], files: dict[str, str]
) -> None:
    config = pretraining(max_steps=60, eval_data=files["text"], learning_rate=1e-2, warmup_steps=5, batch_size=8)
    result = pretrain.run(config)
    start = lines(config)[0]["eval/nll"]
    tokenizer = AutoTokenizer.from_pretrained(Path(config.output_dir, "model"))
    # Untrained, a model of V tokens is near uniform: ln V nats. Sentences that follow a rule need far fewer.
    assert start == pytest.approx(torch.log(torch.tensor(float(len(tokenizer)))).item(), abs=0.2)
    assert result["eval/nll"] < 1.0
    assert result["eval/perplexity"] == pytest.approx(2.718281828459045 ** result["eval/nll"])
    assert result["eval/accuracy"] > 0.6 and result["eval/entropy"] < 1.5

    # The same NLL from the saved folder with transformers alone, document by document.
    model = AutoModelForCausalLM.from_pretrained(Path(config.output_dir, "model"))
    assert isinstance(model, LlamaForCausalLM) and "fastalign" not in type(model).__module__
    total, targets = 0.0, 0
    with torch.no_grad():
        for document in data.tokenize_text(data.load_rows(files["text"]), tokenizer, max_length=40):
            ids = torch.tensor([document.input_ids])
            total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
            targets += ids.shape[1] - 1
    assert total / targets == pytest.approx(result["eval/nll"], rel=1e-5)


def test_the_saved_folder_gives_the_logits_of_the_model_that_was_trained(
    pretraining: Callable[..., pretrain.PretrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    built = recorded(pretrain, monkeypatch)
    config = pretraining(max_steps=2)
    pretrain.run(config)
    loaded = AutoModelForCausalLM.from_pretrained(Path(config.output_dir, "model"))
    ids = torch.arange(2, 22).reshape(2, 10)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, built[0].eval()(ids).logits)


def test_lora_trains_the_adapters_alone_and_saves_them_alone(
    tuning: Callable[..., sft.SFTConfig], base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = recorded(sft, monkeypatch)
    options = {"lora_rank": 4, "lora_dropout": 0.1, "learning_rate": 1e-2, "max_steps": 6, "save_every": 3}
    config = tuning(**options)
    sft.run(config)
    trained = {name for name, weight in built[0].named_parameters() if weight.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    original = load_file(Path(base, "model.safetensors"))
    assert isinstance(built[0], PeftModel)
    base_now = built[0].unload().state_dict()
    assert all(torch.equal(base_now[name], tensor) for name, tensor in original.items())

    folder = Path(config.output_dir, "model")
    adapters = load_file(folder / "adapter_model.safetensors")
    assert len(adapters) == len(trained) and not (folder / "model.safetensors").exists()
    assert all(tensor.abs().max() > 0 for name, tensor in adapters.items() if "lora_B" in name)  # B starts at 0
    losses = [line["loss"] for line in lines(config)]
    assert losses[-1] < losses[0]

    shorter = tuning(**options | {"max_steps": 3, "schedule": "constant"})
    unbroken = tuning(**options | {"schedule": "constant"})
    sft.run(shorter)
    sft.run(tuning(**options | {"schedule": "constant", "output_dir": shorter.output_dir, "resume": True}))
    sft.run(unbroken)
    assert lines(shorter) == lines(unbroken)


def test_compiling_runs_the_same_model(pretraining: Callable[..., pretrain.PretrainConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def traced(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiles = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiles(self, backend=traced, fullgraph=True))
    plain, compiled = (
        pretraining(max_steps=2, eval_data=None),
        pretraining(max_steps=2, eval_data=None, compile=True),
    )
    pretrain.run(plain)
    assert not graphs
    pretrain.run(compiled)
    assert len(graphs) == 1  # rows are padded to one length, and nothing breaks the graph
    assert lines(compiled)[1]["loss"] == pytest.approx(lines(plain)[1]["loss"], rel=1e-5)


@pytest.mark.parametrize("options", [{"bf16": True}, {"gradient_checkpointing": True}, {"dtype": "bfloat16"}])
def test_the_ways_to_save_memory_train(pretraining: Callable[..., pretrain.PretrainConfig], options: dict[str, Any]) -> None:
    plain, changed = pretraining(max_steps=12), pretraining(max_steps=12, **options)
    plain_result, result = pretrain.run(plain), pretrain.run(changed)
    start = lines(plain)[0]["eval/nll"]
    assert result["eval/nll"] < start - 1.0
    stored = {tensor.dtype for tensor in weights(changed).values()}
    if "gradient_checkpointing" in options:
        assert result["eval/nll"] == plain_result["eval/nll"]  # the same operations, again
    else:
        assert lines(changed)[1]["loss"] != lines(plain)[1]["loss"]  # it did compute in bfloat16
        assert stored == {torch.bfloat16 if "dtype" in options else torch.float32}


def test_a_tail_is_the_fused_heads_and_its_share_is_logged(pretraining: Callable[..., pretrain.PretrainConfig]) -> None:
    config = pretraining(max_steps=2, tail_eps=1e-4)
    pretrain.run(config)
    found = lines(config)
    assert [line.get("kept_share") for line in found] == [None, 1.0, 1.0]  # an untrained softmax is flat: all blocks run dense


def test_gradient_checkpointing_recomputes_the_layers(
    pretraining: Callable[..., pretrain.PretrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls: list[int] = []
    forward = LlamaMLP.forward

    def counted(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    config = pretraining(max_steps=1, eval_data=None)
    pretrain.run(config)
    plain = len(calls)
    pretrain.run(pretraining(max_steps=1, eval_data=None, gradient_checkpointing=True))
    assert len(calls) - 2 * plain == 2  # one more forward pass of two layers


def test_clipping_bounds_the_step(tuning: Callable[..., sft.SFTConfig], base: str) -> None:
    # With a huge epsilon AdamW moves by lr·g/ε, so the weights show the gradient that it was given.
    lr, eps, bound = 1e-2, 1e4, 0.125
    options = {"learning_rate": lr, "adam_eps": eps, "max_steps": 1, "schedule": "constant"}
    before = load_file(Path(base, "model.safetensors"))

    def moved(config: sft.SFTConfig) -> float:
        after = weights(config)
        return float(sum(((after[n] - before[n]) ** 2).sum() for n in before)) ** 0.5 * eps / lr

    free, clipped = tuning(**options, max_grad_norm=None), tuning(**options, max_grad_norm=bound)
    sft.run(free)
    sft.run(clipped)
    norm = lines(free)[0]["grad_norm"]
    assert norm > 4 * bound, "the gradient must be larger than its bound for this to test anything"
    assert lines(clipped)[0]["grad_norm"] == norm  # logged as it was before clipping
    assert moved(free) == pytest.approx(norm, rel=1e-3)  # |g| ≪ ε
    assert moved(clipped) == pytest.approx(bound, rel=1e-3)


def test_only_matrices_decay() -> None:
    linear, norm = torch.nn.Linear(3, 2), torch.nn.LayerNorm(2)
    model = torch.nn.Sequential(linear, norm)
    config = TrainConfig(train_data="x", output_dir="x", weight_decay=0.5, learning_rate=0.1)
    optimizer = loop.make_optimizer(config, model)
    for weight in model.parameters():
        weight.data.fill_(1.0)
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.testing.assert_close(linear.weight, torch.full((2, 3), 1 - 0.1 * 0.5))
    assert all(torch.equal(weight, torch.ones(2)) for weight in (linear.bias, *norm.parameters()))


def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights(
    tuning: Callable[..., sft.SFTConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    built = recorded(sft, monkeypatch)
    whole = loop.language_model_loss

    def poisoned(model: torch.nn.Module, batch: loop.Batch, items: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, metrics = whole(model, batch, items)
        return loss * float("nan"), metrics

    monkeypatch.setattr(sft, "language_model_loss", poisoned)
    with pytest.raises(FloatingPointError, match=r"step 1: loss = nan, grad_norm = nan; .* still those of step 0"):
        sft.run(tuning())
    assert all(weight.isfinite().all() for weight in built[0].parameters())


@pytest.mark.parametrize("packing", [False, True])
def test_sft_trains_the_completions_and_packing_does_not_change_what_they_cost(
    tuning: Callable[..., sft.SFTConfig], files: dict[str, str], packing: bool
) -> None:
    config = tuning(eval_data=files["pairs"], packing=packing, max_length=64)
    sft.run(config)
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    total, targets = 0.0, 0
    with torch.no_grad():
        for line in Path(files["pairs"]).read_text().splitlines():
            row = json.loads(line)
            prompt = tokenizer(row["prompt"])["input_ids"]
            ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
            logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            total -= sum(float(logp[place - 1, ids[place]]) for place in range(len(prompt), len(ids)))
            targets += len(ids) - len(prompt)
    assert lines(config)[0]["eval/nll"] == pytest.approx(total / targets, rel=1e-12)


# Schedules


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", {0: 0.25, 3: 1.0, 4: 1.0, 104: 1.0}),
        ("linear", {0: 0.25, 3: 1.0, 4: 1.0, 54: 0.55, 104: 0.1}),
        ("cosine", {0: 0.25, 3: 1.0, 4: 1.0, 54: 0.55, 29: 0.1 + 0.9 * (1 + 0.5**0.5) / 2, 104: 0.1}),
    ],
)
def test_schedules_at_their_corners(schedule: str, expected: dict[int, float]) -> None:
    found = {s: loop.multiplier(s, schedule=schedule, steps=104, warmup_steps=4, final_fraction=0.1) for s in expected}
    assert found == pytest.approx(expected)


def test_a_schedule_without_warm_up_starts_at_the_peak_and_takes_no_step_at_zero() -> None:
    options: dict[str, Any] = {"steps": 3, "warmup_steps": 0, "final_fraction": 0.0}
    rates = [loop.multiplier(step, schedule="linear", **options) for step in range(3)]
    assert rates == pytest.approx([1, 2 / 3, 1 / 3])
    assert loop.multiplier(2, schedule="linear", steps=3, warmup_steps=3, final_fraction=0.0) == 1.0


def test_the_learning_rate_of_each_step_is_the_schedules(
    pretraining: Callable[..., pretrain.PretrainConfig],
) -> None:
    config = pretraining(max_steps=4, schedule="linear", warmup_steps=2, final_fraction=0.5, eval_data=None)
    pretrain.run(config)
    assert [line["learning_rate"] for line in lines(config)] == pytest.approx([5e-3, 1e-2, 1e-2, 7.5e-3])
    with pytest.raises(ValueError, match=r"warmup_steps \(9\) must not exceed the 2 steps"):
        pretrain.run(pretraining(max_steps=2, warmup_steps=9))


@pytest.mark.parametrize(("changes", "steps"), [({}, 3), ({"epochs": 2.5}, 7), ({"epochs": None, "max_steps": 2}, 2)])
def test_epochs_are_rounded_up_to_steps(changes: dict[str, Any], steps: int) -> None:
    config = TrainConfig(train_data="x", output_dir="x", batch_size=4, **changes)
    assert loop.total_steps(config, rows=11) == steps


# Reports


def test_every_step_has_a_line_that_says_what_happened(
    pretraining: Callable[..., pretrain.PretrainConfig],
) -> None:
    config = pretraining(max_steps=5, eval_every=2, batch_size=2)
    result = pretrain.run(config)
    found = lines(config)
    assert [line["step"] for line in found] == [0, 1, 2, 3, 4, 5]
    assert [line["step"] for line in found if "eval/nll" in line] == [0, 2, 4, 5]
    assert {"loss", "nll", "accuracy", "entropy", "grad_norm", "learning_rate", "tokens", "epoch"} <= found[1].keys()
    assert all(one["tokens"] < two["tokens"] for one, two in itertools.pairwise(found[1:]))
    assert {name: result[name] for name in found[-1]} == found[-1] and set(result) - set(found[-1]) == set(WALL_CLOCK)
    assert pretrain.PretrainConfig(**read_config(str(Path(config.output_dir, "config.yaml")))) == config


def test_tensorboard_gets_the_curves(pretraining: Callable[..., pretrain.PretrainConfig]) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    config = pretraining(max_steps=3, report_to="tensorboard")
    pretrain.run(config)
    events = EventAccumulator(str(Path(config.output_dir, "tensorboard")))
    events.Reload()
    curve = [(event.step, event.value) for event in events.Scalars("loss")]
    expected = [(line["step"], line["loss"]) for line in lines(config)[1:]]
    assert curve == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in expected]  # events are fp32
    assert [event.step for event in events.Scalars("eval/nll")] == [0, 3]


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_hosted_reporters_get_every_line(
    pretraining: Callable[..., pretrain.PretrainConfig],
    package: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A package of that name whose three functions write down how they are called.
    source = """
        calls = []
        def init(**options): calls.append(("init", options))
        def log(metrics, step): calls.append(("log", step, metrics))
        def finish(): calls.append(("finish",))
    """
    (tmp_path / f"{package}.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, package, raising=False)
    config = pretraining(max_steps=2, report_to=[package], project="mine")
    pretrain.run(config)
    calls = sys.modules.pop(package).calls
    assert calls[0][0] == "init" and calls[0][1]["project"] == "mine"
    assert calls[0][1]["name"] == Path(config.output_dir).name and calls[0][1]["config"]["batch_size"] == 4
    assert [(kind, *rest[:1]) for kind, *rest in calls[1:]] == [
        ("log", 0),
        ("log", 1),
        ("log", 2),
        ("finish",),
    ]
    assert calls[2][2]["loss"] == lines(config)[1]["loss"]


# Refusals, all before the model is loaded


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test where a model is loaded."""

    def refuse(*arguments: Any, **options: Any) -> None:
        pytest.fail("the model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", refuse)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rat": 1}, "unknown key 'learning_rat'; did you mean learning_rate"),
        ({"zzz": 1}, "unknown key 'zzz'; allowed: adam_eps, attention"),
        ({"model_config": None}, "give one of model .* and model_config .*, got neither"),
        ({"model": "somewhere"}, "give one of model .* and model_config .*, got both"),
        ({"tokenizer": None}, "tokenizer is needed with model_config"),
        ({"learning_rate": -1}, "greater than 0"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        (
            {"batch_size": 6, "micro_batch_size": 4},
            r"batch_size \(6\) must be a multiple of micro_batch_size \(4\)",
        ),
        ({"epochs": 1}, r"max_steps \(7\) and epochs \(1.0\) exclude each other"),
        ({"bf16": True, "dtype": "float64"}, "bf16 autocast needs dtype float32 or bfloat16"),
        ({"eval_data": None, "eval_every": 2}, r"eval_every \(2\) needs eval_data"),
        ({"report_to": "tensorbord"}, "tensorboard.*wandb.*trackio"),
    ],
)
def test_a_wrong_configuration_is_refused_by_name(
    pretraining: Callable[..., pretrain.PretrainConfig], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pretraining(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"report_to": "wandb"}, "report_to: wandb not installed"),
        ({"train_data": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"text_column": "txt"}, "txt"),
        ({"eval_data": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"model_config": {"model_type": "lama"}}, "model_type is 'lama'; did you mean .*llama"),
        ({"model_config": LLAMA | {"hiden_size": 3}}, "unknown key 'hiden_size'; did you mean hidden_size"),
        ({"model_config": LLAMA | {"hidden_size": "big"}}, "model_config: .*hidden_size"),
        ({"model_config": "nowhere.json"}, "model_config: no file 'nowhere.json'"),
        (
            {"model_config": LLAMA | {"vocab_size": 100}},
            r"tokenizer: \d+ tokens do not fit .* vocab_size 100",
        ),
        (
            {"model_config": LLAMA | {"max_position_embeddings": 8}},
            r"a sequence of \d+ tokens does not fit .* 8 \(max_position_embeddings\)",
        ),
        ({"attention": "flash_attention_2"}, "flash_attention_2 needs .*a CUDA device and half precision"),
        ({"liger": True}, "liger: true needs .*a CUDA device"),
    ],
)
def test_what_cannot_run_is_refused_before_the_model_loads(
    pretraining: Callable[..., pretrain.PretrainConfig],
    no_model: None,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    message: str,
) -> None:
    find = report.importlib.util.find_spec
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    with pytest.raises(ValueError, match=message):
        pretrain.run(pretraining(**changes))


def test_a_folder_that_has_a_reporters_name_is_not_that_reporter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trackio").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match="report_to: trackio not installed"):
        report.check_reporters(["trackio"])


def test_bad_demonstrations_are_refused_before_the_model_loads(
    tuning: Callable[..., sft.SFTConfig], files: dict[str, str], no_model: None
) -> None:
    with pytest.raises(ValueError, match=r"bad\.jsonl.*2"):
        sft.run(tuning(train_data=files["bad"]))
    with pytest.raises(ValueError, match=r"a sequence of \d+ tokens does not fit .* 64 \(max_position_embeddings\)"):
        sft.run(tuning(train_data=files["long"], max_length=512))


def test_liger_is_refused_for_a_model_that_it_has_no_layers_for(tuning: Callable[..., sft.SFTConfig], base: str, no_model: None) -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    config, world = tuning(liger=True), World(0, 1, torch.device("cpu"))
    with pytest.raises(ValueError, match="liger: true, but liger-kernel has no layers for gpt2"):
        build.load_model(config, world, AutoConfig.from_pretrained(base), weights=base, attention="sdpa", packed=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"bf16": True, "liger": True}])
def test_training_on_a_gpu(pretraining: Callable[..., pretrain.PretrainConfig], options: dict[str, Any], tmp_path: Path) -> None:
    # In a process of its own: Liger changes transformers' Llama for good.
    config = pretraining(device="cuda", max_steps=12, **options)
    save_config(config, tmp_path / "gpu.yaml")
    torchrun(1, "fastalign.stages.pretrain", "--config", str(tmp_path / "gpu.yaml"))
    assert lines(config)[-1]["eval/nll"] < lines(config)[0]["eval/nll"] - 1.0


def test_a_cuda_device_that_is_not_there_is_refused(
    pretraining: Callable[..., pretrain.PretrainConfig],
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(ValueError, match="device: cuda was asked for"):
        pretrain.run(pretraining(device="cuda"))


def test_a_batch_that_the_devices_do_not_divide_is_refused(
    pretraining: Callable[..., pretrain.PretrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "join_world", lambda device: nullcontext(World(0, 3, torch.device(device))))
    with pytest.raises(ValueError, match=r"batch_size \(4\) must be .* micro_batch_size x devices \(1 x 3\)"):
        pretrain.run(pretraining())


def test_the_loop_serves_a_loss_that_is_no_language_models(base: str, tmp_path: Path) -> None:
    # What later stages build on: any batches, any items, a loss and metrics given as shares.
    config = TrainConfig(
        train_data="x",
        output_dir=str(tmp_path),
        device="cpu",
        max_steps=5,
        batch_size=4,
        learning_rate=0.01,
        schedule="constant",
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).requires_grad_(False)
    head = model.get_output_embeddings().weight.requires_grad_(True)
    counted: list[int] = []

    def pull_to_zero(_: torch.nn.Module, batch: loop.Batch, items: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        counted.append(int(items))
        share = batch["pairs"] / items
        return (head**2).sum() * share, {"half": 0.5 * share}

    with loop.start(config) as world:
        result = loop.train(
            config,
            world,
            model,
            AutoTokenizer.from_pretrained(base),
            rows=4,
            batches_of=lambda step: [{"pairs": 1}, {"pairs": 3}],
            loss_fn=pull_to_zero,
            count_items=lambda batch: int(batch["pairs"]),
        )
    assert set(counted) == {4}
    assert result["half"] == pytest.approx(0.5) and result["tokens"] == 20
    assert result["loss"] < lines(config)[0]["loss"]
