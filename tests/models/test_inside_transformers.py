"""What hosts do with a fused model: transformers' Trainer, pickling, PEFT that comes later. Each is held
against the model as it was."""

from __future__ import annotations

import copy
import pickle
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn import functional as F

from fastalign.causal_lm import UnsupportedModelError, fuse_head, unfuse_head
from tests.models.tiny_models import (
    CONFIGS,
    VOCAB,
    assert_equal_gradients,
    batch,
    build,
    gradients,
    llama,
    lora,
    model_nll,
    shift,
)

WARNS = "it makes full logits, and the fused head does nothing"


def rows() -> list[dict[str, Tensor]]:
    inputs, labels = batch(rows=4)
    return [{"input_ids": inputs["input_ids"][i], "labels": labels[i]} for i in range(4)]


def make_trainer(
    model: Any, folder: Path, *, arguments: dict[str, Any] | None = None, **options: Any
) -> tf.Trainer:
    fixed: dict[str, Any] = {
        "per_device_eval_batch_size": 2,
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "logging_steps": 1,
    }
    fixed |= {
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "learning_rate": 0.1,
        "optim": "sgd",
    }
    training = tf.TrainingArguments(output_dir=str(folder), **fixed | (arguments or {}))
    return tf.Trainer(model=model, args=training, train_dataset=rows(), eval_dataset=rows(), **options)


def top1(logits: Any, labels: Tensor) -> Tensor:
    return logits.argmax(-1)


def accuracy(predicted: tf.EvalPrediction) -> dict[str, float]:
    """Of logits, or of the ids that `top1` made of them."""
    found = predicted.predictions if predicted.predictions.ndim == 2 else predicted.predictions.argmax(-1)
    kept = predicted.label_ids[:, 1:] != -100
    return {
        "accuracy": float((found[:, :-1] == predicted.label_ids[:, 1:])[kept].mean()),
        "shape": float(np.prod(found.shape)),
    }


def told(metrics: dict[str, float]) -> dict[str, float]:
    return {
        name: value
        for name, value in metrics.items()
        if name in ("eval_loss", "test_loss") or "accuracy" in name or "shape" in name
    }


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_metrics_and_predictions_are_those_of_the_model_as_it_was(compiled: bool, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}

    def judge(fused: bool) -> list[Any]:
        model = llama().float()
        if fused:
            fuse_head(model)
        trainer = partial(make_trainer, model, tmp_path, arguments=arguments)
        loss = trainer().evaluate()
        metrics = trainer(compute_metrics=accuracy).evaluate()
        by_ids = trainer(compute_metrics=accuracy, preprocess_logits_for_metrics=top1).evaluate()
        predictions = trainer().predict(rows())
        return [
            told(loss),
            told(metrics),
            told(by_ids),
            told(predictions.metrics),
            predictions.predictions,
            predictions.label_ids,
        ]

    plain, found = judge(fused=False), judge(fused=True)
    eps = torch.finfo(torch.float32).eps
    for seen, expected in zip(found, plain, strict=True):
        if isinstance(expected, dict):
            assert expected and seen == pytest.approx(expected, rel=8 * eps)
        else:
            assert isinstance(seen, np.ndarray) and np.array_equal(seen, expected)
    assert found[4].shape == (4, 11, VOCAB)


def test_an_evaluation_of_the_loss_alone_makes_no_logits(tmp_path: Path) -> None:
    model = fuse_head(llama().float())
    seen: list[Any] = []
    model.register_forward_hook(lambda module, arguments, output: seen.append(output.logits))
    make_trainer(model, tmp_path).evaluate()
    assert seen == [None, None]


class Summed:
    """A loss as a Trainer's user writes one."""

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return (
            F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
            / num_items_in_batch
        )


@pytest.mark.parametrize("case", ["label_smoothing_factor", "compute_loss_func"])
def test_a_host_that_takes_the_labels_away_is_warned_of_once_and_gets_its_own_loss(
    case: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = (
        {"arguments": {case: 0.1}} if case == "label_smoothing_factor" else {case: Summed()}
    )

    def train(model: Any) -> list[float]:
        trainer = make_trainer(model, tmp_path, **options)
        trainer.train()
        return [log["loss"] for log in trainer.state.log_history if "loss" in log]

    expected = train(llama().float())
    with pytest.warns(
        UserWarning, match=f"LlamaForCausalLM was called in training without labels .*{case}.*{WARNS}"
    ) as caught:
        losses = train(fuse_head(llama().float()))
    assert losses == expected and sum(WARNS in str(one.message) for one in caught) == 1


def test_compiled_training_without_labels_has_no_graph_break_and_warns() -> None:
    model, (inputs, _) = fuse_head(llama(num_hidden_layers=1)), batch()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.warns(UserWarning, match=WARNS) as caught:
        logits = [compiled(**inputs, use_cache=False).logits for _ in range(2)]
    assert sum(WARNS in str(one.message) for one in caught) == 1
    torch.testing.assert_close(logits[1], unfuse_head(model)(**inputs).logits, rtol=1e-12, atol=1e-12)


def test_without_gradient_or_in_evaluation_a_call_without_labels_says_nothing() -> None:
    model, (inputs, _) = fuse_head(llama()), batch()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        model(**inputs)
        model.eval()(**inputs)


def double(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
    return 2 * F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def test_a_loss_function_that_is_set_later_is_the_loss() -> None:
    model, (inputs, labels) = fuse_head(llama()), batch()
    fused = model(**inputs, labels=labels).loss
    model.loss_function = double
    with pytest.warns(UserWarning, match=f"got another loss_function after fuse_head.*{WARNS}") as caught:
        out = model(**inputs, labels=labels)
        model(**inputs, labels=labels)
    assert out.logits is not None and sum(WARNS in str(one.message) for one in caught) == 1
    torch.testing.assert_close(out.loss, 2 * fused, rtol=1e-10, atol=0)
    nll = model_nll(model.eval(), inputs, shift(labels))
    torch.testing.assert_close(
        model(**inputs, labels=labels, token_stats=True).logp, -nll, rtol=1e-10, atol=1e-12
    )
    with pytest.raises(
        UnsupportedModelError, match="a loss that differs from the cross-entropy of its logits"
    ):
        fuse_head(model)
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("name", ["llama-tied", "gemma2-softcap"])
@pytest.mark.parametrize("how", ["torch.save", "pickle", "deepcopy"])
def test_a_fused_model_is_saved_whole(name: str, how: str, tmp_path: Path) -> None:
    model, (inputs, labels) = fuse_head(build(CONFIGS[name]())), batch()
    if how == "torch.save":
        torch.save(model, tmp_path / "model.pt")
        found = torch.load(tmp_path / "model.pt", weights_only=False)
    else:
        found = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    expected = model(**inputs, labels=labels)
    expected_grads = gradients(model, expected.loss)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    seen = found(**inputs, labels=labels)
    assert seen.logits is None and torch.equal(seen.loss, expected.loss)
    assert_equal_gradients(gradients(found, seen.loss), expected_grads)
    assert fuse_head(found) is found and unfuse_head(found)(**inputs, labels=labels).logits is not None
    assert not [
        key
        for module in found.modules()
        for key in module.__dict__
        if key == "forward" or "fastalign" in key or "reduce" in key
    ]


def test_modules_to_save_that_come_later_are_served() -> None:
    inputs, labels = batch()
    model = lora(fuse_head(llama()), modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    nll = model_nll(model, inputs, shift(labels))
    out = model(**inputs, labels=labels)
    torch.testing.assert_close(out.logp, -nll, rtol=1e-10, atol=1e-12)


def test_a_forward_that_is_replaced_already_is_named_on_one_line() -> None:
    class Owner(nn.Module):
        def take(self, *args: Any, **kwargs: Any) -> Any: ...

    for forward, name in (
        (llama().forward, r"transformers\S+LlamaForCausalLM.forward"),
        (Owner().take, r"\S+Owner.take"),
    ):
        model = llama()
        model.forward = forward
        with pytest.raises(
            UnsupportedModelError,
            match=rf"has the forward of its LlamaForCausalLM replaced by {name} ",
        ) as caught:
            fuse_head(model)
        assert "\n" not in str(caught.value) and "(lm_head)" not in str(caught.value)
