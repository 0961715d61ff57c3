"""The fused head in transformers' Trainer, and under DDP and FSDP on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as tf
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from fastalign.causal_lm import fuse_head
from tests.models.tiny_models import (
    CONFIGS,
    assert_equal_gradients,
    batch,
    build,
    gradients,
    llama,
    model_nll,
    shift,
)
from tests.two_ranks import be_a_rank, run_as_two_ranks

pytestmark = pytest.mark.hosts


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_a_trainer_run_equals_the_unfused_one(name: str, tmp_path: Path) -> None:
    inputs, labels = batch(rows=8)
    rows = [{"input_ids": inputs["input_ids"][i], "labels": labels[i]} for i in range(8)]

    def train(fused: bool, dtype: torch.dtype) -> tuple[list[float], dict[str, Tensor]]:
        model = build(CONFIGS[name](), dtype=dtype)
        arguments = tf.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            optim="sgd",
            learning_rate=0.1,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = tf.Trainer(model=fuse_head(model) if fused else model, args=arguments, train_dataset=rows)
        assert trainer.model_accepts_loss_kwargs
        trainer.train()
        return [log["loss"] for log in trainer.state.log_history if "loss" in log], dict(
            model.named_parameters()
        )

    plain_losses, plain = train(False, torch.float32)
    losses, weights = train(True, torch.float32)
    _, exact = train(True, torch.float64)
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(losses, plain_losses, rtol=8 * eps, atol=0)
    for key, value in exact.items():
        floor = 4 * eps * value.abs().max()
        assert (weights[key] - value).abs().max() <= 2 * (plain[key] - value).abs().max() + floor, key


# Two gloo ranks, in processes of their own that run this file.

DISTRIBUTED = ["ddp", "fsdp-tied", "fsdp-untied", "fsdp-lm-head"]


def distributed_model(case: str) -> Any:
    return llama(tie_word_embeddings=case == "fsdp-tied")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("two_ranks")
    run_as_two_ranks(__file__, folder)
    return torch.load(folder / "result.pt")


@pytest.mark.cpu_only
@pytest.mark.parametrize("token_stats", [False, True])
@pytest.mark.parametrize("case", DISTRIBUTED)
def test_two_ranks_equal_one(case: str, token_stats: bool, two_ranks: dict[str, Any]) -> None:
    model = distributed_model(case)
    inputs, labels = batch(rows=4)
    nll = model_nll(model, inputs, shift(labels)).sum() / (shift(labels) != -100).sum()
    expected = gradients(model, nll)
    loss, found = two_ranks[f"{case} {token_stats}"]
    torch.testing.assert_close(loss, nll.detach(), rtol=1e-10, atol=0)
    assert_equal_gradients({name: 2 * gradient for name, gradient in found.items()}, expected)


@pytest.mark.cpu_only
def test_every_parameter_trains_when_fused_after_fully_shard(two_ranks: dict[str, Any]) -> None:
    """`fully_shard`, then `fuse_head`, then the optimizer: it held gathered copies of 3 of 21 tensors."""
    moved = two_ranks["moved"]
    assert len(moved) == 21 and all(moved.values()), [name for name, m in moved.items() if not m]


def moved_by_a_step(mesh: Any) -> dict[str, bool]:
    """Which parameters an optimizer changes that was made after `fully_shard` and then `fuse_head`."""
    model = llama(tie_word_embeddings=False)
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh)
    fuse_head(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = {name: p.full_tensor().clone() for name, p in model.named_parameters()}
    inputs, labels = batch(rows=4)
    model(**inputs, labels=labels).loss.backward()
    optimizer.step()
    for module in (*model.model.layers, model):
        module.reshard()
    return {name: not torch.equal(p.full_tensor(), before[name]) for name, p in model.named_parameters()}


def run_rank(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    result: dict[str, Any] = {"moved": moved_by_a_step(mesh)}
    inputs, labels = batch(rows=4)
    count = int((shift(labels) != -100).sum())
    half = slice(2 * rank, 2 * rank + 2)
    for case in DISTRIBUTED:
        model = fuse_head(distributed_model(case))
        wrapped = model
        if case == "ddp":
            wrapped = nn.parallel.DistributedDataParallel(model)
        else:
            head_group = [model.lm_head] if case == "fsdp-lm-head" else []
            for module in (*model.model.layers, *head_group, model):
                fully_shard(module, mesh=mesh)
        for token_stats in (False, True):
            model.zero_grad()  # before the forward: after it, FSDP2's root still holds unsharded parameters
            out = wrapped(
                **{name: value[half] for name, value in inputs.items()},
                labels=labels[half],
                num_items_in_batch=count,
                token_stats=token_stats,
            )
            found = gradients(model, out.loss)
            loss = out.loss.detach().clone()
            dist.all_reduce(loss)
            shards: dict[str, Any] = found
            full = {name: g.full_tensor() if case != "ddp" else g for name, g in shards.items()}
            result[f"{case} {token_stats}"] = (loss, full)
    if rank == 0:
        torch.save(result, folder / "result.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    be_a_rank(run_rank)
