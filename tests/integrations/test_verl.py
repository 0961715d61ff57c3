"""verl's fused head and policy loss: of the installed verl, or of a stand-in with its parameters."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign.integrations import hosts
from fastalign.integrations import verl as integration
from fastalign.integrations.published import VERL, VERL_POLICY_LOSS
from tests.integrations.stand_ins import installed, module, stand_in
from tests.models.tiny_models import VOCAB, llama


def score(
    hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    logp = ((hidden @ weight.T) / temperature).log_softmax(-1)
    return logp.gather(-1, ids[..., None])[..., 0], -(logp.exp() * logp).sum(-1)


def eager_linear_for_ppo(
    hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0, **_: Any
) -> tuple[Tensor, Tensor]:
    return score(hidden_states, vocab_weights, input_ids, temperature)


def eager_aggregation(losses: Tensor, mask: Tensor, mode: str, info: dict[str, Any]) -> Tensor:
    dp, losses = info["dp_size"], losses * mask
    tokens = info["batch_num_tokens"] or mask.sum()
    sequences = info["global_batch_size"] or mask.any(-1).sum()
    length = info["loss_scale_factor"] or mask.shape[-1]
    return {
        "token-mean": losses.sum() / tokens,
        "token-sum": losses.sum(),
        "seq-mean-token-sum": losses.sum() / sequences,
        "seq-mean-token-sum-norm": losses.sum() / sequences / length,
        "seq-mean-token-mean": (losses.sum(-1) / (mask.sum(-1) + 1e-8)).sum() / sequences,
    }[mode] * dp


def eager_vanilla(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str,
    config: Any,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    low, high = config.clip_ratio_low, config.clip_ratio_high
    low, high = (config.clip_ratio if bound is None else bound for bound in (low, high))
    log_ratio = (log_prob - old_log_prob).clamp(-20, 20)
    ratio = log_ratio.exp()
    free, held = -advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high)
    lowest = -advantages * config.get("clip_ratio_c", 3.0)
    losses = torch.maximum(free, held)
    metrics = {
        "actor/pg_clipfrac": (held > free),
        "actor/ppo_kl": -log_ratio,
        "actor/pg_clipfrac_lower": (losses > lowest) & (advantages < 0),
    }
    losses = torch.where(advantages < 0, torch.minimum(losses, lowest), losses)
    if rollout_is_weights is not None:
        losses = losses * rollout_is_weights
    loss = eager_aggregation(losses, response_mask, loss_agg_mode, config.global_batch_info)
    return loss, {name: value[response_mask].float().mean().item() for name, value in metrics.items()}


@pytest.fixture
def verl(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    if installed(VERL) is not None:
        bodies: dict[str, Callable[..., Any]] = {
            "FusedLinearForPPO.forward": eager_linear_for_ppo,
            "compute_policy_loss_vanilla": eager_vanilla,
        }
        for described in (VERL, VERL_POLICY_LOSS):
            stand_in(monkeypatch, described, bodies)
        algorithms: Any = module(monkeypatch, "verl.trainer.ppo.core_algos")
        algorithms.POLICY_LOSS_REGISTRY = {"vanilla": algorithms.compute_policy_loss_vanilla}
        kernel: Any = module(monkeypatch, "verl.utils.kernel.linear_cross_entropy")
        kernel.linear_cross_entropy = lambda *arguments: score(*arguments[:4])
    yield SimpleNamespace(
        kernel=importlib.import_module("verl.utils.kernel.linear_cross_entropy"),
        functional=importlib.import_module("verl.utils.experimental.torch_functional"),
        engines=importlib.import_module("verl.workers.engine.base"),
        algorithms=importlib.import_module("verl.trainer.ppo.core_algos"),
    )
    integration.unpatch()


@pytest.fixture
def call() -> tuple[Tensor, Tensor, Tensor, float]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 5, 8), 0.3 * torch.randn(53, 8)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(53, (2, 5)), 0.7


def assert_same(ours: Any, theirs: Any, inputs: tuple[Tensor, Tensor]) -> None:
    for value, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(value, expected.view_as(value), rtol=2e-6, atol=2e-6)
    grads = [torch.autograd.grad(sum(x.sin().sum() for x in found), inputs) for found in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "liger"])
def test_the_module_gives_verls_values_and_gradients(verl: Any, call: Any, backend: str) -> None:
    scorer = verl.functional.FusedLinearForPPO()
    theirs = scorer.forward(*call)
    scorer.impl_backend = backend
    with integration.patch() as handle:
        ours = scorer.forward(*call)
    assert handle.calls == 1 and ours[0].shape == call[2].shape
    assert_same(ours, theirs, call[:2])


def test_the_triton_backend_gives_flat_values(verl: Any, call: Any) -> None:
    theirs = verl.functional.FusedLinearForPPO().forward(*call)
    with integration.patch() as handle:
        ours = verl.kernel.linear_cross_entropy(*call, "none")
    assert handle.calls == 1 and ours[0].shape == (10,)
    assert_same(ours, theirs, call[:2])


def test_unpatch_gives_everything_back(verl: Any) -> None:
    def functions() -> tuple[Any, ...]:
        return (
            verl.kernel.linear_cross_entropy,
            verl.functional.FusedLinearForPPO.forward,
            verl.engines.BaseEngine.train_batch,
            verl.algorithms.POLICY_LOSS_REGISTRY["vanilla"],
        )

    before = functions()
    handle = integration.patch()
    integration.patch_policy_loss()
    assert integration.patch() is handle
    assert all(new is not old for new, old in zip(functions(), before, strict=True))
    integration.unpatch()
    assert functions() == before


def test_the_worker_module_patches(verl: Any) -> None:
    import fastalign.integrations.verl_worker as worker

    importlib.reload(worker)
    assert hosts.patched("verl") is not None


def test_a_vocabulary_over_several_ranks_is_left_to_verl_with_one_warning(
    verl: Any, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verl.kernel, "linear_cross_entropy", lambda *arguments: arguments[-1])
    group = SimpleNamespace(size=lambda: 2)
    with integration.patch() as handle, pytest.warns(UserWarning, match="sharded over 2 ranks") as caught:
        for _ in range(2):
            assert verl.kernel.linear_cross_entropy(*call, "none", group) is group
    assert handle.calls == 0 and len(caught) == 1
    alone = SimpleNamespace(size=lambda: 1)
    with integration.patch() as handle:
        verl.kernel.linear_cross_entropy(*call, "none", alone)
    assert handle.calls == 1


def test_a_step_without_a_call_warns_unless_it_trains_values(
    verl: Any, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(verl.engines.BaseEngine, "train_batch", lambda self, data, loss_function: "trained")

    class FSDPEngineWithValueHead(verl.engines.BaseEngine):
        __init__ = object.__init__

    class FSDPEngineWithLMHead(FSDPEngineWithValueHead):
        pass

    monkeypatch.setattr(hosts, "check_published", lambda published: None)
    with integration.patch():
        assert FSDPEngineWithValueHead().train_batch({}, None) == "trained" and not recwarn.list
        FSDPEngineWithLMHead.__name__ = "FSDPEngine"
        with pytest.warns(UserWarning, match="got 0 calls of fastalign.*use_fused_kernels=True"):
            FSDPEngineWithLMHead().train_batch({}, None)


@pytest.mark.parametrize("batch", ["train_batch", "infer_batch"])
def test_lora_on_the_head_is_refused_because_the_fused_kernels_would_leave_it_out(
    verl: Any, call: Any, monkeypatch: pytest.MonkeyPatch, batch: str
) -> None:
    class Engine(verl.engines.BaseEngine):
        __init__ = object.__init__

    score_tokens = lambda *_: verl.functional.FusedLinearForPPO().forward(*call)  # noqa: E731
    monkeypatch.setattr(verl.engines.BaseEngine, batch, score_tokens)
    monkeypatch.setattr(hosts, "check_published", lambda published: None)
    engine = Engine()
    engine.module = torch.nn.ModuleDict({"lm_head": torch.nn.Module(), "q_proj": torch.nn.Module()})
    engine.module["q_proj"].lora_A = torch.nn.ModuleDict()
    with integration.patch() as handle:
        getattr(engine, batch)({}, None)
        assert handle.calls == 1
        engine.module["lm_head"].lora_A = torch.nn.ModuleDict()
        with pytest.raises(ValueError, match="got LoRA on lm_head.*use_fused_kernels=False"):
            getattr(engine, batch)({}, None)
        verl.functional.FusedLinearForPPO().forward(*call)  # outside of a batch nothing is known


class Config(SimpleNamespace):
    """What the policy loss reads of verl's ActorConfig."""

    def __init__(self, **values: Any) -> None:
        defaults = {"clip_ratio": 0.2, "clip_ratio_low": None, "clip_ratio_high": None}
        super().__init__(**defaults | values)

    def get(self, name: str, default: Any) -> Any:
        return getattr(self, name, default)


LOCAL = {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None, "loss_scale_factor": None}
GLOBAL = {"dp_size": 2, "batch_num_tokens": 37, "global_batch_size": 9, "loss_scale_factor": 11}
MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]


@pytest.mark.parametrize("info", [LOCAL, GLOBAL], ids=["local", "global"])
@pytest.mark.parametrize("mode", MODES)
def test_the_policy_loss_and_its_metrics_are_verls(verl: Any, mode: str, info: dict[str, Any]) -> None:
    torch.manual_seed(0)
    old, logp = -torch.rand(4, 7), (-torch.rand(4, 7) * 2).requires_grad_()
    mask = torch.rand(4, 7) < 0.7
    mask[1] = False  # a completion without tokens
    weights = torch.rand(4, 7) * 2
    config = Config(clip_ratio_high=0.28, clip_ratio_c=1.4, global_batch_info=info)
    arguments = (old, logp, torch.randn(4, 7), mask, mode, config, weights)
    losses = verl.algorithms.POLICY_LOSS_REGISTRY
    theirs = losses["vanilla"](*arguments)
    with integration.patch_policy_loss() as handle:
        ours = losses["vanilla"](*arguments)
    assert handle.calls == 1
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-7)
    assert ours[1] == pytest.approx(theirs[1], abs=1e-6)
    assert all(theirs[1].values()), "each metric has something to say"
    torch.testing.assert_close(*(torch.autograd.grad(found[0], logp) for found in (ours, theirs)))


def worst_case(case: str) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor | None, dict[str, Any]]:
    """Four tensors [1, 4], weights, and totals, that a loss must survive."""
    old, advantages = torch.full((1, 4), -1.0), torch.tensor([[1.0, -1.0, 2.0, -2.0]])
    logp, mask = torch.tensor([[-0.1, -0.2, -3.0, -1.1]]), torch.ones(1, 4, dtype=torch.bool)
    weights, info = None, dict(LOCAL)
    if case == "weights of 0":
        weights = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    elif case == "a log-ratio of -60":
        logp[0, 2] = -61.0
    elif case == "a log-probability of -inf":
        logp[0, 2] = -torch.inf
    return (old, logp, advantages, mask), weights, info


@pytest.mark.parametrize("case", ["weights of 0", "a log-ratio of -60", "a log-probability of -inf"])
def test_the_policy_loss_and_its_metrics_are_verls_at_the_edges(verl: Any, case: str) -> None:
    tensors, weights, info = worst_case(case)
    tensors[1].requires_grad_()
    arguments = (*tensors, "token-mean", Config(clip_ratio_c=1.4, global_batch_info=info), weights)
    losses = verl.algorithms.POLICY_LOSS_REGISTRY
    theirs = losses["vanilla"](*arguments)
    with integration.patch_policy_loss():
        ours = losses["vanilla"](*arguments)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-7)
    assert ours[1] == pytest.approx(theirs[1], abs=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(found[0], tensors[1]) for found in (ours, theirs)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("info", [LOCAL, LOCAL | {"batch_num_tokens": 0, "global_batch_size": 0}])
def test_a_batch_without_tokens_gives_0(verl: Any, mode: str, info: dict[str, Any]) -> None:
    row = torch.zeros(1, 2, requires_grad=True)
    arguments = (row.detach(), row, row.detach() + 1, torch.zeros(1, 2, dtype=torch.bool))
    with integration.patch_policy_loss():
        vanilla = verl.algorithms.POLICY_LOSS_REGISTRY["vanilla"]
        loss, _ = vanilla(*arguments, mode, Config(global_batch_info=info))
    loss.backward()
    assert loss == 0 and row.grad is not None and not row.grad.any()


def test_clips_that_ppo_loss_does_not_take_are_left_to_verl_with_one_warning(verl: Any) -> None:
    row, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2, dtype=torch.bool)
    config = Config(clip_ratio_low=-0.1, global_batch_info=LOCAL)
    arguments = (row, row + 0.5, row + 1.5, mask, "token-mean", config)
    plain = verl.algorithms.POLICY_LOSS_REGISTRY["vanilla"](*arguments)
    with integration.patch_policy_loss() as handle, pytest.warns(UserWarning, match="clips -0.1") as caught:
        for _ in range(2):
            assert verl.algorithms.POLICY_LOSS_REGISTRY["vanilla"](*arguments) == plain
    assert handle.calls == 0 and len(caught) == 1


def test_the_policy_loss_is_replaced_where_bypass_mode_calls_it(verl: Any) -> None:
    original = verl.algorithms.compute_policy_loss_vanilla
    with integration.patch_policy_loss():
        assert verl.algorithms.compute_policy_loss_vanilla is verl.algorithms.POLICY_LOSS_REGISTRY["vanilla"]
        assert verl.algorithms.compute_policy_loss_vanilla is not original
    assert verl.algorithms.compute_policy_loss_vanilla is original


def test_a_policy_loss_that_someone_registered_as_vanilla_is_not_replaced(
    verl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def users_loss() -> None: ...

    monkeypatch.setitem(verl.algorithms.POLICY_LOSS_REGISTRY, "vanilla", users_loss)
    with pytest.raises(hosts.UnsupportedHostError, match="users_loss registered as the policy loss vanilla"):
        integration.patch_policy_loss()
    assert verl.algorithms.POLICY_LOSS_REGISTRY["vanilla"] is users_loss


def test_a_temperature_in_a_tensor_is_left_to_verl_with_one_warning(verl: Any, call: Any) -> None:
    scorer = verl.functional.FusedLinearForPPO()
    arguments = (*call[:3], torch.tensor(0.7))
    with (
        integration.patch() as handle,
        pytest.warns(UserWarning, match="a temperature in a tensor") as caught,
    ):
        for _ in range(2):
            assert_same(scorer.forward(*arguments), score(*call), call[:2])
    assert handle.calls == 0 and len(caught) == 1


def test_a_mode_that_verl_refuses_is_refused_by_verl(verl: Any) -> None:
    config, row = Config(global_batch_info=LOCAL), torch.zeros(1, 2)
    with integration.patch_policy_loss() as handle, pytest.raises((ValueError, KeyError)):
        verl.algorithms.POLICY_LOSS_REGISTRY["vanilla"](row, row, row, row == 0, "median", config)
    assert handle.calls == 0


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_model_that_verl_patched_gives_the_same(verl: Any, backend: str) -> None:
    dense = pytest.importorskip("verl.models.transformers.dense_common", reason="verl is not installed")
    model, ids = llama().float(), torch.randint(VOCAB, (1, 9))

    def run(backend: str) -> tuple[Tensor, Tensor]:
        forward = getattr(dense, f"forward_with_{backend}_backend")
        output = forward(model, input_ids=ids, temperature=0.8, return_dict=True)
        return output.log_probs, output.entropy

    theirs = run("torch")
    with integration.patch() as handle:
        ours = run(backend)
    assert handle.calls == 1
    for value, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(value, expected.view_as(value), rtol=2e-6, atol=2e-6)
