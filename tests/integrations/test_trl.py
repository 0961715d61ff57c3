"""TRL's trainers with and without fastalign's head: what they log, and who scored the tokens."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

trl = pytest.importorskip("trl", reason="trl is not installed")

from bench.experiments.trl_runs import largest_difference, train  # noqa: E402
from fastalign.causal_lm import UnsupportedModelError, fuse_head  # noqa: E402
from fastalign.integrations import trl as integration  # noqa: E402
from fastalign.integrations.hosts import UnsupportedHostError  # noqa: E402
from fastalign_kernels.linear.token_outputs import linear_token_outputs  # noqa: E402
from tests.models.tiny_models import llama  # noqa: E402

SCORING = ["SFT", "DPO", "KTO", "GRPO", "RLOO"]


def assert_same(trainer: str, **options: Any) -> None:
    """Every logged number is the same to 1e-5, and we are called as often as TRL was."""
    without, patched = (train(trainer, patched=patched, steps=2, **options) for patched in (False, True))
    difference = largest_difference(patched, without)
    assert difference.relative < 1e-5 and difference.absolute < 1e-5, difference
    assert len(patched.logs) == 3 + ("eval_strategy" in options) and len(patched.logs[0]) > 5
    assert patched.fastalign_calls == without.trl_calls > 0 == patched.trl_calls


@pytest.mark.parametrize("trainer", SCORING)
def test_a_trainer_logs_the_same_numbers(trainer: str) -> None:
    assert_same(trainer)


def test_the_reward_trainer_makes_no_call_and_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    without, patched = (train("Reward", patched=patched, steps=1) for patched in (False, True))
    assert patched.logs == without.logs and patched.fastalign_calls == 0
    assert not [warning for warning in recwarn if "fastalign" in str(warning.message)]


def test_another_version_of_trl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastalign.integrations.hosts.version", lambda name: "1.17.0")
    with pytest.raises(UnsupportedHostError, match=r"^trl: got version 1\.17\.0, expected 1\.16, "):
        integration.patch()


def test_other_parameters_of_trl_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import trl.trainer.utils as utils

    class Older:
        @staticmethod
        def forward(ctx, hidden, weight, bias, targets, temperature, chunk_size): ...

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Older)
    with pytest.raises(
        UnsupportedHostError, match="^trl: got trl.trainer.utils._ChunkedLogProbFunction.forward"
    ):
        integration.patch()
    assert utils._ChunkedLogProbFunction is Older


def test_unpatch_gives_everything_back() -> None:
    import transformers.trainer
    import trl.trainer.utils as utils

    before = utils._ChunkedLogProbFunction, utils._use_triton, [*transformers.trainer.DEFAULT_CALLBACKS]
    with integration.patch() as handle:
        assert utils._ChunkedLogProbFunction is not before[0] and integration.patch() is handle
    after = utils._ChunkedLogProbFunction, utils._use_triton, [*transformers.trainer.DEFAULT_CALLBACKS]
    assert after == before


def fused_with(tail_eps: float) -> Callable[[Any], None]:
    return lambda model: fuse_head(model, tail_eps=tail_eps)


def test_a_fused_model_in_a_trainer_is_served_by_the_patch() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fastalign")
        fused, plain = (train("SFT", patched=True, steps=2, prepare=prepare) for prepare in (fuse_head, None))
    assert fused == plain._replace(seconds=fused.seconds)


def test_a_fused_model_in_a_trainer_without_the_patch_is_named_once() -> None:
    with pytest.warns(
        UserWarning, match=r"got a fused LlamaForCausalLM in a TRL trainer.*trl\.patch\(\)"
    ) as caught:
        assert train("SFT", patched=False, steps=2, prepare=fuse_head).trl_calls == 2
    assert sum("got a fused" in str(one.message) for one in caught) == 1


def test_a_tail_eps_that_the_patch_does_not_have_is_named() -> None:
    with pytest.warns(UserWarning, match=r"tail_eps: got 0\.25 from fuse_head, expected None as given to"):
        train("SFT", patched=True, steps=1, prepare=fused_with(tail_eps=0.25))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="tail_eps")
        patch = {"tail_eps": 0.25}
        assert train(
            "SFT", patched=True, steps=1, patch=patch, prepare=fused_with(tail_eps=0.25)
        ).fastalign_calls


def test_fusing_a_model_that_a_trainer_has_names_trls_function() -> None:
    from trl.trainer.utils import add_fused_lm_head

    model = llama()
    add_fused_lm_head(model)
    with pytest.raises(
        UnsupportedModelError, match=r"got a forward of its own from a TRL trainer.*trl\.patch\(\)"
    ):
        fuse_head(model)


LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.mark.parametrize(
    ("trainer", "options"),
    [
        ("DPO", {"lora": LORA, "use_weighting": True}),
        ("SFT", {"packing": True, "packing_strategy": "wrapped", "max_length": 16}),
        ("SFT", {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}),
        ("SFT", {"eval_strategy": "steps", "eval_steps": 2}),
        ("DPO", {"config": {"final_logit_softcapping": 1.5, "head_dim": 8}}),
        ("GRPO", {"temperature": 0.7, "top_entropy_quantile": 0.5, "cast_lm_head_to_fp32": True}),
    ],
    ids=["lora-wpo", "packing", "accumulation", "evaluation", "softcap", "entropy"],
)
def test_an_option_of_a_trainer_leaves_the_numbers_the_same(trainer: str, options: dict[str, Any]) -> None:
    assert_same(trainer, **options)


def test_bf16_autocast_differs_by_bf16s_rounding() -> None:
    without, patched = (train("SFT", patched=patched, steps=2, bf16=True) for patched in (False, True))
    assert largest_difference(patched, without).relative < 2e-2
    assert patched.fastalign_calls == without.trl_calls == 2


# Against TRL's function itself


@pytest.fixture
def call() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "hidden": torch.randn(12, 16, requires_grad=True),
        "weight": (0.2 * torch.randn(53, 16)).requires_grad_(),
        "bias": torch.randn(53, requires_grad=True),
        "targets": torch.randint(53, (12,)),
        "temperature": 0.7,
        "chunk_size": 20,
        "final_logit_softcapping": None,
        "logit_scale": 1.5,
    }


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "entropy"), integration.OPTIONAL_OUTPUTS])
def test_all_outputs_and_gradients_are_trls(
    call: dict[str, Any], softcap: float | None, outputs: tuple[str, ...]
) -> None:
    import trl.trainer.utils as utils

    arguments = [*(call | {"final_logit_softcapping": softcap, "outputs": outputs}).values()]
    theirs = utils._ChunkedLogProbFunction.apply(*arguments)
    with integration.patch() as handle:
        ours = utils._ChunkedLogProbFunction.apply(*arguments)
    assert handle.calls == 1 and len(ours) == len(theirs) == 5
    for value, expected in zip(ours, theirs, strict=True):
        assert (value is None) == (expected is None)
        if value is not None:
            torch.testing.assert_close(value, expected, rtol=2e-6, atol=2e-6)
    grads = [
        torch.autograd.grad(
            sum(output.sin().sum() for output in found[:2] if output is not None), arguments[:3]
        )
        for found in (ours, theirs)
    ]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


def test_a_weight_of_another_low_precision_is_cast_as_trl_does(call: dict[str, Any]) -> None:
    import trl.trainer.utils as utils

    low = {name: call[name].detach().bfloat16().requires_grad_() for name in ("weight", "bias")}
    arguments = [*(call | low).values()]
    theirs = utils._ChunkedLogProbFunction.apply(*arguments)
    with integration.patch():
        ours = utils._ChunkedLogProbFunction.apply(*arguments)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    ours[0].sum().backward()
    assert low["weight"].grad is not None and low["weight"].grad.dtype == torch.bfloat16


def test_a_weight_that_zero_3_shards_is_left_to_trl_with_one_warning(call: dict[str, Any]) -> None:
    import trl.trainer.utils as utils

    call["weight"].ds_id = 0
    expected = utils._ChunkedLogProbFunction.apply(*call.values())[0]
    with (
        integration.patch() as handle,
        pytest.warns(UserWarning, match="^trl: got an lm_head sharded") as caught,
    ):
        for _ in range(2):
            assert torch.equal(utils._ChunkedLogProbFunction.apply(*call.values())[0], expected)
    assert handle.calls == 0 and len(caught) == 1


def test_a_batch_without_labels_trains_nothing() -> None:
    from trl.trainer.utils import add_fused_lm_head

    model = llama().float()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    ids = torch.randint(97, (2, 5))
    with integration.patch():
        output = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
    output.loss.backward()
    assert output.loss == 0 and not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_ignored_positions_are_skipped_on_a_cpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from trl.trainer.utils import add_fused_lm_head

    scored: list[int] = []

    def recording(hidden: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        scored.append(len(hidden))
        return linear_token_outputs(hidden, *arguments, **options)

    monkeypatch.setattr(integration, "linear_token_outputs", recording)
    model = llama().float()
    add_fused_lm_head(model)
    ids = torch.arange(10).view(2, 5)
    labels = ids.where(ids % 3 == 0, -100)  # 0 is first of its row; 3, 6 and 9 are scored
    plain = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
    with integration.patch():
        patched = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
    assert scored == [3]
    torch.testing.assert_close(patched, plain)


@pytest.mark.parametrize("fp32", [False, True], ids=["as it is", "cast_lm_head_to_fp32"])
def test_an_adapter_on_lm_head_is_in_the_logits_and_gets_its_gradient(fp32: bool) -> None:
    """TRL's function alone reads the base's weight: its logits lack the adapter."""
    from trl.trainer.utils import add_fused_lm_head

    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = get_peft_model(llama().float(), lora)
    trained = [weight for name, weight in model.named_parameters() if "lora_" in name]
    ids = torch.randint(97, (2, 7))
    logits = model(input_ids=ids).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    true_grads = torch.autograd.grad(expected, trained)
    add_fused_lm_head(model.get_base_model(), cast_lm_head_to_fp32=fp32)
    alone = model(input_ids=ids, labels=ids, fused_lm_head=True).loss
    assert abs(alone - expected) > 1e-3
    with integration.patch() as handle:
        found = model(input_ids=ids, labels=ids, fused_lm_head=True).loss
        with model.disable_adapter():
            off = model(input_ids=ids, labels=ids, fused_lm_head=True).loss
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert handle.calls == 2 and abs(off - found) > 1e-3
    for grad, true in zip(torch.autograd.grad(found, trained), true_grads, strict=True):
        torch.testing.assert_close(grad, true, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("trainer", ["SFT", "DPO", "GRPO"])
def test_a_trainer_takes_an_adapter_on_lm_head_when_it_is_patched(trainer: str) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    models: list[Any] = []
    assert train(trainer, patched=True, steps=2, lora=lora, prepare=models.append).fastalign_calls
    (moved,) = (w for name, w in models[0].named_parameters() if "lm_head.lora_B" in name)
    assert moved.abs().max() > 0  # it began as zeros
    with pytest.raises(ValueError, match="Applying a PEFT adapter to `lm_head` is not supported"):
        train(trainer, patched=False, steps=1, lora=lora)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": {"use_dora": True}}, "not supported: the log-prob"),
        ({"cast_lm_head_to_fp32": True}, "cast_lm_head"),
    ],
    ids=["DoRA", "cast_lm_head_to_fp32"],
)
def test_what_is_not_served_on_lm_head_is_still_refused_by_trl(options: dict[str, Any], message: str) -> None:
    lora = LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM", **options.pop("lora", {}))
    with pytest.raises(ValueError, match=message):
        train("GRPO", patched=True, steps=1, lora=lora, **options)


def test_a_training_without_a_call_warns_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastalign.integrations.hosts.unserved", lambda hidden, weight: "a test")
    with pytest.warns(UserWarning, match="^trl: got 0 calls of fastalign in a training with SFTConfig"):
        assert train("SFT", patched=True, steps=1).fastalign_calls == 0


def test_a_compiled_call_has_no_graph_break(call: dict[str, Any]) -> None:
    import trl.trainer.utils as utils

    def score(hidden: torch.Tensor, weight: torch.Tensor) -> Any:
        arguments = call | {"hidden": hidden, "weight": weight, "outputs": integration.OPTIONAL_OUTPUTS}
        return utils._ChunkedLogProbFunction.apply(*arguments.values())

    with integration.patch() as handle:
        plain = score(call["hidden"], call["weight"])
        compiled = torch.compile(score, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            torch.testing.assert_close(compiled(call["hidden"], call["weight"]), plain)
    assert handle.calls == 2, "one eager, one traced"


def test_an_adapter_on_lm_head_in_a_compiled_forward_is_refused(call: dict[str, Any]) -> None:
    import trl.trainer.utils as utils

    lora = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(llama().float(), lora)
    with integration.patch():
        taken = trl.SFTTrainer.__init__.__globals__["BaseTunerLayer"]

        class Trainer:  # TRL asks in a constructor
            def __init__(self) -> None:
                self.refused = isinstance(model.get_output_embeddings(), taken)

        assert not Trainer().refused
        compiled = torch.compile(utils._ChunkedLogProbFunction.apply, backend="eager")
        with pytest.raises(Exception, match="got an adapter on lm_head in a compiled forward"):
            compiled(*call.values())
