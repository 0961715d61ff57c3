"""The training loop and its two first stages, on a tiny Llama and a few dozen rows: batches, ranks, what is
trained and saved."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from fastalign import data
from fastalign.stages import batches, loop, optimization, pretrain, sft
from fastalign.stages.config import TrainConfig, save_config
from fastalign.stages.models import loading
from fastalign.stages.runs import checkpoint
from fastalign.stages.runs.distributed import World
from tests.stages.tiny import assert_close, lines, torchrun, weights


def recorded(stage: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[torch.nn.Module]:
    """Collects the models that the stage's runs load from now on."""
    built: list[torch.nn.Module] = []

    def load_model(*arguments: Any, **options: Any) -> torch.nn.Module:
        built.append(loading.load_model(*arguments, **options))
        return built[-1]

    monkeypatch.setattr(stage, "load_model", load_model)
    return built


# Accumulation and ranks


def test_eight_micro_batches_of_one_equal_one_of_eight(tuning: Callable[..., sft.SFTConfig]) -> None:
    whole, parts = tuning(max_steps=2), tuning(max_steps=2, micro_batch_size=1)
    sft.run(whole)
    sft.run(parts)
    assert ragged_targets(whole), "the rows must differ in their numbers of targets"
    assert_close(whole, parts, atol=1e-10, rel=1e-10)


def ragged_targets(config: sft.SFTConfig) -> bool:
    rows = data.tokenize_sft(
        data.load_rows(config.train_data), loading.load_tokenizer(config.model), max_length=config.max_length
    )
    return len({sum(row.trained) for row in rows}) > 5


def test_two_gloo_ranks_equal_one_process(
    tuning: Callable[..., sft.SFTConfig], files: dict[str, str], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"micro_batch_size": 2, "eval_data": files["pairs"], "schedule": "constant"}
    options |= {"max_grad_norm": 0.5, "save_every": 2}
    alone, together = tuning(**options, max_steps=3), tuning(**options, max_steps=2)
    sft.run(alone)
    save_config(together, tmp_path / "two.yaml")
    torchrun(2, "fastalign.stages.sft", "--config", str(tmp_path / "two.yaml"))
    found = checkpoint.latest(together.output_dir)
    assert found is not None
    assert sorted(path.name for path in found.iterdir()) == [
        *(".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.sha256"),
        *("rank-0.sha256", "rank-1.sha256", "state.json"),
    ]
    sizes = [(found / f"__{rank}_0.distcp").stat().st_size for rank in range(2)]
    assert max(sizes) < 1.5 * min(sizes), "each rank writes about as much"

    # The third step on one process shows that their checkpoint is good too.
    with pytest.warns(UserWarning, match="resuming on 1 processes a run of 2"):
        sft.run(dataclasses.replace(together, max_steps=3, resume=True))
    # The run of two steps evaluated at its end, and that of three did not there.
    assert_close(alone, together, atol=1e-10, rel=1e-10, shown=without_the_evaluation_at_2)


def without_the_evaluation_at_2(config: TrainConfig) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in line.items() if line["step"] != 2 or not name.startswith("eval/")}
        for line in lines(config)
    ]


def test_every_rank_gets_its_own_rows_and_all_get_each_once() -> None:
    config = TrainConfig(train_data="x", output_dir="x", batch_size=6, micro_batch_size=1, seed=5)
    rows = list(range(9))
    seen = []
    for step in range(3):  # 18 rows: two epochs
        ranks = []
        for rank in range(2):
            world = World(rank, 2, torch.device("cpu"))
            batches_of = batches.epoch_batches(rows, lambda picked: {"rows": list(picked)}, config, world)
            step_batches = batches_of(step)
            assert len(step_batches) == 3
            ranks.append([row for batch in step_batches for row in batch["rows"]])
        assert not set(ranks[0]) & set(ranks[1]) or step == 1  # step 1 takes from two epochs
        seen += ranks[0] + ranks[1]
    assert sorted(seen) == sorted(rows * 2)
    first, second = (
        [batches.rows_of_step(s, rows=9, batch_size=9, seed=5) for s in range(2)] for _ in range(2)
    )
    assert first == second and first[0] != first[1]
    assert first[0] != batches.rows_of_step(0, rows=9, batch_size=9, seed=6)


def test_held_out_rows_are_shared_without_loss_or_repetition() -> None:
    config = TrainConfig(train_data="x", output_dir="x", batch_size=4, micro_batch_size=2)
    shares = []
    for rank in range(2):
        world = World(rank, 2, torch.device("cpu"))
        held_out = batches.held_out_batches(
            list(range(7)), lambda picked: {"rows": list(picked)}, config, world
        )
        assert all(len(batch["rows"]) <= 2 for batch in held_out)
        shares.append([row for batch in held_out for row in batch["rows"]])
    assert sorted(shares[0] + shares[1]) == list(range(7))
    with pytest.raises(ValueError, match="eval_data: got 1 rows for 2 devices"):
        batches.held_out_batches(
            [0], lambda picked: {"rows": picked}, config, World(0, 2, torch.device("cpu"))
        )


# What is trained, and what is left on disk


@pytest.mark.hosts
def test_a_memorisable_set_is_memorised_and_the_saved_model_is_that_model(
    pretraining: Callable[..., pretrain.PretrainConfig], files: dict[str, str]
) -> None:
    config = pretraining(
        max_steps=80, eval_data=files["text"], learning_rate=1e-2, warmup_steps=5, batch_size=8
    )
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


@pytest.mark.hosts
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
    assert all(
        tensor.abs().max() > 0 for name, tensor in adapters.items() if "lora_B" in name
    )  # B starts at 0
    losses = [line["loss"] for line in lines(config)]
    assert losses[-1] < losses[0]

    shorter = tuning(**options | {"max_steps": 3, "schedule": "constant"})
    unbroken = tuning(**options | {"schedule": "constant"})
    sft.run(shorter)
    sft.run(tuning(**options | {"schedule": "constant", "output_dir": shorter.output_dir, "resume": True}))
    sft.run(unbroken)
    assert lines(shorter) == lines(unbroken)


def test_compiling_runs_the_same_model(
    pretraining: Callable[..., pretrain.PretrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def traced(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiles = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self: compiles(self, backend=traced, fullgraph=True)
    )
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
def test_the_ways_to_save_memory_train(
    pretraining: Callable[..., pretrain.PretrainConfig], options: dict[str, Any]
) -> None:
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


def test_a_tail_is_the_fused_heads_and_its_share_is_logged(
    pretraining: Callable[..., pretrain.PretrainConfig],
) -> None:
    config = pretraining(max_steps=2, tail_eps=1e-4)
    pretrain.run(config)
    found = lines(config)
    assert [line.get("kept_share") for line in found] == [
        None,
        1.0,
        1.0,
    ]  # an untrained softmax is flat: all blocks run dense


@pytest.mark.hosts
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
    optimizer = optimization.make_optimizer(config, model)
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

    def poisoned(
        model: torch.nn.Module, batch: batches.Batch, items: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, metrics = whole(model, batch, items)
        return loss * float("nan"), metrics

    monkeypatch.setattr(sft, "language_model_loss", poisoned)
    with pytest.raises(
        FloatingPointError, match=r"step 1: got loss = nan, grad_norm = nan, .* still those of step 0"
    ):
        sft.run(tuning())
    assert all(weight.isfinite().all() for weight in built[0].parameters())


@pytest.mark.hosts
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"bf16": True, "liger": True}])
def test_training_on_a_gpu(
    pretraining: Callable[..., pretrain.PretrainConfig], options: dict[str, Any], tmp_path: Path
) -> None:
    # In a process of its own: Liger changes transformers' Llama for good.
    config = pretraining(device="cuda", max_steps=12, **options)
    save_config(config, tmp_path / "gpu.yaml")
    torchrun(1, "fastalign.stages.pretrain", "--config", str(tmp_path / "gpu.yaml"))
    assert lines(config)[-1]["eval/nll"] < lines(config)[0]["eval/nll"] - 1.0


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

    def pull_to_zero(
        _: torch.nn.Module, batch: batches.Batch, items: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
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
