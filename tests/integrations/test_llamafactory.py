"""LLaMA-Factory's v1 trainers: of the installed package, or of a stand-in with its parameters."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.trainer
from torch import Tensor
from torch.nn import functional as F

from fastalign.integrations import hosts
from fastalign.integrations import llamafactory as integration
from fastalign.integrations.published import LLAMAFACTORY, LLAMAFACTORY_CHUNK_LOSS
from tests.integrations.stand_ins import installed, stand_in
from tests.models.tiny_models import VOCAB, llama


def eager_log_probs(self: Any, model: Any, batch: dict[str, Tensor]) -> Tensor:
    dropped = ("position_ids",) if getattr(self, "_uses_mrope", False) else ()  # after 0.9.5
    logits = model(**{k: v for k, v in batch.items() if k not in dropped}).logits.float()[:, :-1]
    return -F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none")


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A trainer without the set-up of a training."""
    if installed(LLAMAFACTORY) is not None:
        stand_in(monkeypatch, LLAMAFACTORY, {"BaseTrainer.compute_log_probs": eager_log_probs})
    base = importlib.import_module("llamafactory.v1.core.base_trainer").BaseTrainer
    if not hasattr(base, "compute_log_probs"):
        pytest.skip("this LLaMA-Factory has the chunked loss")
    made: Any = object.__new__(type("SFTTrainer", (base,), {"compute_loss": lambda self, batch: None}))
    made.device, made._uses_mrope = torch.device("cpu"), False
    yield made
    integration.unpatch()


def batch() -> dict[str, Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(3, VOCAB, (2, 9))
    return {"input_ids": ids, "labels": ids.where(ids > 20, -100), "attention_mask": torch.ones_like(ids)}


def test_the_trainers_log_probs_and_gradients_are_the_same(trainer: Any) -> None:
    scored, gradients = [], []
    for patched in (False, True):
        model = llama().float()
        if patched:
            handle = integration.patch()
        scored.append(trainer.compute_log_probs(model, batch()))
        scored[-1].sin().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert handle.calls == 1 and scored[0].shape == (2, 8)
    torch.testing.assert_close(*scored, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_a_wrapped_model_is_fused_inside_and_makes_no_logits(trainer: Any) -> None:
    inner = llama().float()
    wrapped = torch.nn.Module()
    wrapped.module = inner
    wrapped.forward = inner.forward
    plain = trainer.compute_log_probs(inner, batch())
    wrapped.forward = lambda **inputs: inner(**inputs)
    with integration.patch():
        torch.testing.assert_close(trainer.compute_log_probs(wrapped, batch()), plain, rtol=1e-5, atol=1e-5)
        assert inner(**batch()).logits is None


def test_the_model_gets_the_inputs_that_the_trainer_chooses(
    trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Builds after 0.9.5 drop position_ids that a model with mRoPE makes itself."""
    monkeypatch.setattr(type(trainer).__mro__[1], "compute_log_probs", eager_log_probs)
    monkeypatch.setattr(hosts, "check_published", lambda published: None)
    monkeypatch.setattr(hosts, "check_version", lambda host, tested: "0.9.6.dev0")
    trainer._uses_mrope = True
    given = batch() | {"position_ids": torch.arange(9).flip(0).expand(2, 9)}
    model = llama().float()
    plain = trainer.compute_log_probs(model, given)
    with integration.patch():
        torch.testing.assert_close(trainer.compute_log_probs(model, given), plain, rtol=1e-5, atol=1e-5)


def test_unpatch_leaves_a_model_that_the_trainer_can_score(trainer: Any) -> None:
    model = llama().float()
    plain = trainer.compute_log_probs(model, batch())
    with integration.patch():
        trainer.compute_log_probs(model, batch())
    assert torch.equal(trainer.compute_log_probs(model, batch()), plain)


def test_a_model_that_cannot_be_fused_is_left_to_the_trainer_with_one_warning(trainer: Any) -> None:
    model = llama().float()
    plain = trainer.compute_log_probs(model, batch())
    model.forward = model.forward
    with integration.patch() as handle, pytest.warns(UserWarning, match="own function runs") as caught:
        for _ in range(2):
            assert torch.equal(trainer.compute_log_probs(model, batch()), plain)
    assert handle.calls == 0 and len(caught) == 1


def test_a_training_without_a_call_warns_unless_it_trains_a_reward_model(
    trainer: Any, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(type(trainer).__mro__[1], "fit", lambda self: "trained")
    with integration.patch():
        type(trainer).__name__ = "RMTrainer"
        assert trainer.fit() == "trained" and not recwarn.list
        type(trainer).__name__ = "SFTTrainer"
        with pytest.warns(UserWarning, match="llamafactory: got 0 calls of fastalign"):
            trainer.fit()


def test_a_training_of_v0_warns_that_it_is_not_patched(trainer: Any) -> None:
    class Fp8Arguments: ...

    class TrainingArguments(Fp8Arguments): ...

    with integration.patch():
        callback = transformers.trainer.DEFAULT_CALLBACKS[-1]
        callback.on_train_begin(TrainingArguments(), None, None)
        with pytest.warns(UserWarning, match="llamafactory: got 0 calls .*v0 is not patched, use v1"):
            callback.on_train_end(TrainingArguments(), None, None)
    assert callback not in transformers.trainer.DEFAULT_CALLBACKS


# The chunked loss of later commits


def chunked_linear_cross_entropy(
    hidden_states: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    labels: Tensor,
    loss_weights: Tensor,
    chunk_size: int,
    denominator: Tensor | None = None,
) -> Tensor:
    logits = F.linear(hidden_states, head_weight, head_bias).float()
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return (losses * loss_weights).sum() / (loss_weights.sum() + 1e-6 if denominator is None else denominator)


def chunked_linear_log_probs(
    hidden_states: Tensor, head_weight: Tensor, head_bias: Tensor | None, labels: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden_states, head_weight, head_bias).float()
    return -F.cross_entropy(logits.transpose(1, 2), labels, reduction="none"), logits.mean(-1).detach()


@pytest.fixture
def interceptor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    if installed(LLAMAFACTORY_CHUNK_LOSS) is not None:
        if installed(LLAMAFACTORY) is None:
            pytest.skip("this LLaMA-Factory has no chunked loss")
        bodies: dict[str, Callable[..., Any]] = {
            "chunked_linear_cross_entropy": chunked_linear_cross_entropy,
            "chunked_linear_log_probs": chunked_linear_log_probs,
        }
        stand_in(monkeypatch, LLAMAFACTORY_CHUNK_LOSS, bodies)
    yield importlib.import_module(LLAMAFACTORY_CHUNK_LOSS.functions[0].module)
    integration.unpatch()


@pytest.fixture
def head() -> SimpleNamespace:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(2, 5, 8), 0.3 * torch.randn(53, 8), torch.randn(53)
    trained = tuple(tensor.requires_grad_() for tensor in (hidden, weight, bias))
    labels = torch.randint(53, (2, 5))
    labels[0, :2] = -100
    return SimpleNamespace(trained=trained, labels=labels, weights=torch.rand(2, 5))


@pytest.mark.parametrize("denominator", [None, torch.tensor(3.5)])
def test_the_chunked_loss_is_the_same(interceptor: Any, head: Any, denominator: Tensor | None) -> None:
    arguments = (*head.trained, head.labels, head.weights, 2, denominator)
    theirs = interceptor.chunked_linear_cross_entropy(*arguments)
    with integration.patch() as handle:
        ours = interceptor.chunked_linear_cross_entropy(*arguments)
    assert handle.calls == 1
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, head.trained) for loss in (ours, theirs)))


def test_the_chunked_log_probs_and_mean_logits_are_the_same(interceptor: Any, head: Any) -> None:
    theirs = interceptor.chunked_linear_log_probs(*head.trained, head.labels, 2)
    with integration.patch() as handle:
        ours = interceptor.chunked_linear_log_probs(*head.trained, head.labels, 2)
    assert handle.calls == 1 and not ours[1].requires_grad
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        *(torch.autograd.grad(found[0].sin().sum(), head.trained) for found in (ours, theirs))
    )


def test_lora_on_the_head_is_refused_because_the_chunked_loss_would_leave_it_out(
    interceptor: Any, head: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = importlib.import_module("llamafactory.v1.core.base_trainer").BaseTrainer
    chunked = lambda self: interceptor.chunked_linear_log_probs(*head.trained, head.labels, 2)  # noqa: E731
    monkeypatch.setattr(trainer, "fit", chunked)
    running = trainer.__new__(trainer)
    running.model = torch.nn.ModuleDict({"lm_head": torch.nn.Module()})
    with integration.patch() as handle:
        running.fit()
        assert handle.calls == 1
        running.model["lm_head"].lora_A = torch.nn.ModuleDict()
        with pytest.raises(ValueError, match="LLaMA-Factory: got LoRA on lm_head, expected other"):
            running.fit()


def test_hidden_states_without_kernels_are_left_to_llamafactory(
    interceptor: Any, head: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "unserved", lambda hidden, weight: "a test")
    with integration.patch() as handle, pytest.warns(UserWarning, match="^llamafactory: got a test"):
        interceptor.chunked_linear_log_probs(*head.trained, head.labels, 2)
    assert handle.calls == 0
