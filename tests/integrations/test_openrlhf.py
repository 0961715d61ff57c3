"""OpenRLHF's actor: of the installed package, or of a stand-in that scores tokens as it does."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastalign.causal_lm import fuse_head
from fastalign.integrations import openrlhf as integration
from fastalign.integrations.hosts import UnsupportedHostError
from fastalign.integrations.published import OPENRLHF
from tests.integrations.stand_ins import installed, module, stand_in
from tests.models.tiny_models import VOCAB, llama


def eager_forward(
    self: Any,
    sequences: Tensor,
    action_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    return_output: bool = False,
    return_logprobs: bool = False,
    return_entropy: bool = False,
    **_: Any,
) -> Any:
    """Logits in fp32, the temperature, the entropy, the log-probabilities: in OpenRLHF's order."""
    actors: Any = importlib.import_module("openrlhf.models.actor")
    targets = torch.roll(sequences, -1, 1)
    if self.packing_samples:
        sequences, _positions, targets, *_rest = actors.unpad_and_slice_tensor(
            sequences, attention_mask, None
        )
        attention_mask = None
    output = self.model(sequences, attention_mask=attention_mask)
    output["logits"] = output["logits"].to(torch.float32)
    output["logits"].div_(self.temperature)
    if return_entropy:
        output.entropy = actors.compute_entropy(output["logits"])[:, :-1]
    if action_mask is None and not return_logprobs:
        return output
    logp = actors.log_probs_from_logits(output["logits"], targets)[:, :-1]
    if action_mask is not None:
        logp = logp[:, -action_mask.shape[1] :] * action_mask.float()
    return (logp, output) if return_output else logp


BODIES: dict[str, Callable[..., Any]] = {
    "Actor.forward": eager_forward,
    "log_probs_from_logits": lambda logits, labels: logits.log_softmax(-1).gather(-1, labels[..., None])[
        ..., 0
    ],
    "compute_entropy": lambda logits: torch.distributions.Categorical(logits=logits).entropy(),
}


@pytest.fixture
def actor_class(monkeypatch: pytest.MonkeyPatch) -> Iterator[type]:
    if installed(OPENRLHF) is not None:
        stand_in(monkeypatch, OPENRLHF, BODIES)
        actors: Any = module(monkeypatch, "openrlhf.models.actor")
        actors.Actor = type("Actor", (nn.Module,), {"forward": actors.Actor.forward})
    yield importlib.import_module("openrlhf.models.actor").Actor
    integration.unpatch()


@pytest.fixture
def actor(actor_class: type) -> Any:
    return build(actor_class)


def build(actor_class: type) -> Any:
    made: Any = object.__new__(actor_class)
    nn.Module.__init__(made)
    made.model, made.temperature, made.packing_samples = llama().float(), 0.7, False
    return made


def sequences() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(3, VOCAB, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return ids, mask


def run(actor: Any, **options: Any) -> tuple[list[Tensor], list[Tensor | None]]:
    ids, mask = sequences()
    found = actor(ids, attention_mask=mask, **options)
    logp, output = found if isinstance(found, tuple) else (found, None)
    values = [logp] if output is None else [logp, output.entropy]
    sum(value.sin().sum() for value in values).backward()
    return values, [parameter.grad for parameter in actor.parameters()]


ACTIONS = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
CALLS = {
    "ppo": {"action_mask": ACTIONS, "return_output": True, "return_entropy": True},
    "reference": {"action_mask": ACTIONS},
    "sft": {"return_logprobs": True},
}


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
def test_log_probs_entropy_and_gradients_are_the_same(actor_class: type, options: dict[str, Any]) -> None:
    theirs = run(build(actor_class), **options)
    with integration.patch() as handle:
        ours = run(build(actor_class), **options)
    assert handle.calls == 1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_no_logits_are_made_and_whoever_reads_them_is_told(actor: Any) -> None:
    ids, mask = sequences()
    with integration.patch():
        _, output = actor(ids, ACTIONS, attention_mask=mask, return_output=True)
        with pytest.raises(AttributeError, match="logits.shape: got a model fused by fastalign"):
            _ = output["logits"].shape


def test_a_call_for_logits_is_not_touched(actor: Any) -> None:
    ids, mask = sequences()
    with integration.patch() as handle:
        output = actor(ids, attention_mask=mask, return_output=True)
    assert handle.calls == 0 and output["logits"].shape == (2, 9, VOCAB)


def test_unpatch_gives_the_model_its_own_forward_back_unless_it_was_fused_before(actor_class: type) -> None:
    ids, mask = sequences()
    loaned, fused = build(actor_class), build(actor_class)
    fuse_head(fused.model)
    with integration.patch():
        for actor in (loaned, fused):
            actor(ids, ACTIONS, attention_mask=mask)
    assert loaned.model(input_ids=ids, labels=ids).logits is not None
    assert fused.model(input_ids=ids, labels=ids).logits is None


def test_a_forward_that_reads_the_entropy_before_the_temperature_is_refused(actor: Any) -> None:
    """As in 0.11.0, whose parameters are the same. The model scored with the temperature."""
    actors: Any = importlib.import_module("openrlhf.models.actor")

    def forward_of_0_11_0(sequences: Tensor, attention_mask: Tensor, *, return_entropy: bool) -> Any:
        output = actor.model(sequences, attention_mask=attention_mask)
        logits = output["logits"].to(torch.float32)
        entropy = actors.compute_entropy(logits) if return_entropy else None
        return actors.log_probs_from_logits(logits, torch.roll(sequences, -1, 1), actor.temperature), entropy

    ids, mask = sequences()
    plain = actor(ids, attention_mask=mask, return_logprobs=True)
    with integration.patch() as handle:
        actor(ids, attention_mask=mask, return_logprobs=True)  # fuses
        scoring = integration._Scoring(handle)
        with scoring._scoring(actor, torch.roll(ids, -1, 1)):
            logp, _ = forward_of_0_11_0(ids, mask, return_entropy=False)
            torch.testing.assert_close(logp[:, :-1], plain, rtol=1e-5, atol=1e-5)
            with pytest.raises(UnsupportedHostError, match="^openrlhf: got entropy of undivided logits"):
                forward_of_0_11_0(ids, mask, return_entropy=True)


def test_release_0_11_0_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration.hosts, "version", lambda name: "0.11.0")
    with pytest.raises(
        UnsupportedHostError, match=r"^openrlhf: got version 0\.11\.0, expected 0\.11\.1 or 0\.11\.2"
    ):
        integration.patch()


def test_packed_targets_are_those_that_openrlhf_packed(actor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    actors: Any = importlib.import_module("openrlhf.models.actor")
    if installed(OPENRLHF) is None:
        pytest.skip("OpenRLHF packs with flash-attn, which needs a GPU")

    def unpad(sequences: Tensor, attention_mask: Tensor, ring_attn_group: Any) -> Any:
        targets = torch.roll(sequences, -1, 1)
        return sequences.view(1, -1), None, targets.view(1, -1), 0, None

    monkeypatch.setattr(actors, "unpad_and_slice_tensor", unpad)
    monkeypatch.setattr(integration.hosts, "check_published", lambda published: None)
    actor.packing_samples = True
    ids, mask = sequences()
    plain = actor(ids, attention_mask=mask, return_logprobs=True)
    with integration.patch() as handle:
        torch.testing.assert_close(
            actor(ids, attention_mask=mask, return_logprobs=True), plain, rtol=1e-5, atol=1e-5
        )
    assert handle.calls == 1 and plain.shape == (1, 17)


def test_a_failing_call_leaves_no_hooks(actor: Any) -> None:
    ids, _ = sequences()
    with integration.patch():
        with pytest.raises(Exception):  # noqa: B017
            actor(ids, ACTIONS, attention_mask=torch.ones(1, 3))
        assert not actor.model._forward_hooks and not actor.model._forward_pre_hooks


def test_a_model_that_cannot_be_fused_is_left_to_openrlhf_with_one_warning(actor: Any) -> None:
    actor.model.forward = actor.model.forward
    ids, mask = sequences()
    plain = actor(ids, ACTIONS, attention_mask=mask)
    with integration.patch() as handle, pytest.warns(UserWarning, match="own function runs") as caught:
        for _ in range(2):
            assert torch.equal(actor(ids, ACTIONS, attention_mask=mask), plain)
    assert handle.calls == 0 and len(caught) == 1


def test_weights_that_zero_3_shards_are_left_to_openrlhf(actor: Any) -> None:
    actor.model.lm_head.weight.ds_id = 0
    ids, mask = sequences()
    with integration.patch() as handle, pytest.warns(UserWarning, match="sharded by DeepSpeed's ZeRO-3"):
        actor(ids, ACTIONS, attention_mask=mask)
    assert handle.calls == 0


def test_a_step_of_the_actor_without_a_call_warns(
    actor: Any, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    strategy = importlib.import_module("openrlhf.utils.deepspeed.deepspeed").DeepspeedStrategy

    def optimizer_step(self, _optimizer, model, _scheduler, name="model", **kwargs) -> None: ...

    monkeypatch.setattr(strategy, "optimizer_step", optimizer_step)
    made = object.__new__(strategy)
    ids, mask = sequences()
    with integration.patch():
        actor(ids, ACTIONS, attention_mask=mask)
        made.optimizer_step(None, actor, None, "actor")
        made.optimizer_step(None, nn.Linear(1, 1), None, "critic")
        assert not recwarn.list
        with pytest.warns(UserWarning, match="openrlhf: got 0 calls of fastalign"):
            made.optimizer_step(None, actor, None, "actor")
