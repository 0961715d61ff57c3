"""`loss_function` against transformers' own, in a model that keeps its logits and in the Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from transformers.loss.loss_utils import ForCausalLMLoss

from fastalign.integrations.transformers import loss_function
from tests.models.tiny_models import VOCAB, batch, llama


def causal_batch(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    logits = torch.randn(3, 7, VOCAB, dtype=dtype, requires_grad=True)
    return logits, torch.randint(VOCAB, (3, 7)).index_fill(1, torch.tensor([2]), -100)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("num_items", [None, 5, torch.tensor(5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_and_its_gradient_are_transformers(
    shifted: bool, num_items: Any, dtype: torch.dtype
) -> None:
    logits, labels = causal_batch(dtype)
    given: dict[str, Any] = {"shift_labels": labels} if shifted else {}
    losses = [
        function(logits, labels, VOCAB, num_items_in_batch=num_items, use_cache=False, **given)
        for function in (loss_function, ForCausalLMLoss)
    ]
    ours, theirs = losses
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    grads = [torch.autograd.grad(loss, logits)[0] for loss in losses]
    torch.testing.assert_close(*grads)


def test_the_ignored_label_may_be_another() -> None:
    logits, labels = causal_batch()
    ours, theirs = (
        function(logits, labels.where(labels >= 0, 3), VOCAB, ignore_index=3)
        for function in (loss_function, ForCausalLMLoss)
    )
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)


def test_a_trainer_logs_the_same_losses(tmp_path: Path) -> None:
    inputs, labels = batch(rows=8)
    rows = [{"input_ids": inputs["input_ids"][i], "labels": labels[i]} for i in range(8)]

    def losses(ours: bool) -> list[float]:
        model = llama()
        if ours:
            model.loss_function = loss_function
        arguments = tf.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=0.01,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = tf.Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        return [log["loss"] for log in trainer.state.log_history if "loss" in log]

    assert losses(ours=True) == pytest.approx(losses(ours=False), rel=1e-6)


def test_other_columns_than_the_vocabularys_are_refused() -> None:
    logits, labels = causal_batch()
    with pytest.raises(ValueError, match=f"logits: got {VOCAB} columns, expected vocab_size, 96"):
        loss_function(logits, labels, 96)


def test_no_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="labels: got None without shift_labels"):
        loss_function(causal_batch()[0], None, VOCAB)
