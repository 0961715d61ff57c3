"""Liger's chunked losses against Liger's own on a CPU, if it is installed, and against formulas in fp64."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import fastalign.integrations.liger as ours
from bench.experiments.liger_cases import PAIRED, V, call, cases, expected_loss, tensors

ALL = (*PAIRED, "KTO", "GRPO")


def named(loss: str) -> str:
    return f"LigerFusedLinear{loss}Loss"


def grads(loss: Tensor, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(2 * loss, [given[name] for name in ("weight", "hidden", "bias")])


CASES = [pytest.param(*row, id=f"{row[0]}-{i}") for i, row in enumerate(cases())]


@pytest.mark.parametrize(("loss", "options", "extra"), CASES)
def test_values_and_gradients_are_ligers_own(
    loss: str, options: dict[str, Any], extra: dict[str, Any]
) -> None:
    theirs = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    given = tensors(torch.float32)
    modules = [getattr(package, named(loss))(**options, compiled=False) for package in (ours, theirs)]
    results = [call(module, given, **extra) for module in modules]
    (value, beside), (their_value, their_beside) = results
    torch.testing.assert_close(value, their_value, rtol=2e-6, atol=2e-6)
    assert len(beside) == len(their_beside)
    if "delta" in options:  # the share of clipped tokens includes those that delta clips
        beside, their_beside = beside[:-1], their_beside[:-1]
    assert not any(x.requires_grad for x in beside)
    for mine, other in zip(beside, their_beside, strict=True):
        torch.testing.assert_close(mine, other.detach(), rtol=2e-5, atol=2e-5, check_dtype=False)
    torch.testing.assert_close(grads(value, given), grads(their_value, given), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("loss", ALL)
def test_the_constructors_and_the_call_orders_are_ligers(loss: str) -> None:
    theirs = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    mine, original = getattr(ours, named(loss)), getattr(theirs, named(loss))
    for a, b in ((mine, original), (mine.forward, original.forward)):
        assert [(p.name, p.default) for p in inspect.signature(a).parameters.values()] == [
            (p.name, p.default) for p in inspect.signature(b).parameters.values()
        ]


@pytest.mark.parametrize(("loss", "options", "extra"), CASES)
def test_values_and_gradients_are_the_formulas_in_fp64(
    loss: str, options: dict[str, Any], extra: dict[str, Any]
) -> None:
    given = tensors()
    extra = {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in extra.items()
    }
    value, _ = call(getattr(ours, named(loss))(**options), given, **extra)
    expected = expected_loss(loss, given, options, extra)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grads(value, given), grads(expected, given), rtol=1e-8, atol=1e-10)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("DPO", {"label_smoothing": 0.1}, "^label_smoothing: got 0.1 with loss_type='sigmoid', where Liger ig"),
    ("DPO", {"loss_type": "ipo"}, "^loss_type: got 'ipo', expected one of sigmoid, hinge"),
    ("DPO", {"discopop_tau": 0.1}, "^discopop_tau: got 0.1, expected 0.05"),
    ("GRPO", {"importance_sampling_level": "word"}, "^importance_sampling_level: got 'word' with loss_type"),
    (
        "GRPO",
        {"importance_sampling_level": "sequence", "loss_type": "cispo", "epsilon_high": 2.0},
        "^importance_sampling_level: got 'sequence' with loss_type='cispo', expected 'token'",
    ),
    ("GRPO", {"loss_type": "cispo"}, "^loss_type: got 'cispo' with epsilon_high=0.2, delta=None, expected"),
    ("GRPO", {"use_bias_correction_kl": True}, "^use_bias_correction_kl: got True, expected False"),
    ("GRPO", {"loss_type": "dr_grpo"}, "^max_completion_length: got None with loss_type='dr_grpo'"),
    ("GRPO", {"delta": 1.1}, "^delta: got 1.1, expected at least 1 . epsilon_high, 1.2"),
    ("GRPO", {"loss_type": "gspo"}, "^loss_type: got 'gspo', expected one of grpo, bnpo, dapo"),
    (
        "GRPO",
        {"loss_type": "luspo"},
        "^importance_sampling_level: got 'token' with loss_type='luspo', expected",
    ),
    (
        "GRPO",
        {"loss_type": "luspo", "importance_sampling_level": "sequence"},
        "^beta: got 0.04 with loss_type='luspo', expected 0",
    ),
    (
        "GRPO",
        {"loss_type": "sapo", "sapo_temperature_neg": 0.0},
        "^sapo_temperature: got .*, expected both > 0",
    ),
]


@pytest.mark.parametrize(("loss", "options", "message"), REFUSED)
def test_what_is_not_served_is_refused_by_name(loss: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(ours, named(loss))(**options)


def test_luspo_refuses_a_ratio_for_each_token() -> None:
    module = ours.LigerFusedLinearGRPOLoss(0.0, loss_type="luspo", importance_sampling_level="sequence")
    given = tensors()
    with pytest.raises(ValueError, match=r"^vllm_is_ratio: got shape \[6, 5\] with loss_type='luspo'"):
        call(module, given, vllm_is_ratio=given["ratio"])


@pytest.mark.parametrize("missing", ["ref_hidden", "ref_weight"])
@pytest.mark.parametrize("loss", ["DPO", "KTO", "GRPO"])
def test_a_missing_reference_is_refused_by_name(loss: str, missing: str) -> None:
    given: dict[str, Any] = {**tensors(), missing: None}
    name = missing.replace("hidden", "input")
    with pytest.raises(ValueError, match=f"^{name}: got None "):
        call(getattr(ours, named(loss))(use_ref_model=True), given)


def test_kto_needs_labels() -> None:
    with pytest.raises(ValueError, match=r"^preference_labels: got None, expected \[S\] bool"):
        call(ours.LigerFusedLinearKTOLoss(), {**tensors(), "labels": None})  # type: ignore[dict-item]


@pytest.mark.parametrize("name", ["LigerFusedLinearKLDivLoss", "LigerKLDIVLoss"])
def test_distillation_of_logits_is_refused_by_name(name: str) -> None:
    with pytest.raises(ImportError, match=f"^fastalign.integrations.liger: got {name}, expected one of "):
        getattr(ours, name)


def test_whoever_patches_a_model_is_told_the_line_to_write() -> None:
    with pytest.raises(ImportError, match="got apply_liger_kernel_to_llama, expected fastalign.causal_lm.fu"):
        from fastalign.integrations.liger import apply_liger_kernel_to_llama  # noqa: F401


def test_grpo_names_a_tensor_that_is_none() -> None:
    given = tensors()
    head = (given["hidden"], given["weight"], given["target"].clamp(min=0))
    with pytest.raises(ValueError, match="^attention_mask: got None, expected a torch.Tensor"):
        ours.LigerFusedLinearGRPOLoss(beta=0.0)(*head, None, given["advantages"])


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "sapo", "vespo"])
def test_grpo_reads_nothing_outside_the_mask(loss_type: str) -> None:
    given = tensors()
    outside = given["target"] < 0
    module = ours.LigerFusedLinearGRPOLoss(loss_type=loss_type, epsilon_high=2.0)
    head = (given["hidden"], given["weight"])
    beside = {"ref_input": given["ref_hidden"], "ref_weight": given["ref_weight"]}

    def loss(ids: int, value: float) -> Tensor:
        old = given["old"].masked_fill(outside, value)
        ratio = given["ratio"].masked_fill(outside, value)
        tokens = (given["target"].masked_fill(outside, ids), ~outside, given["advantages"])
        return module(*head, *tokens, old_per_token_logps=old, vllm_is_ratio=ratio, **beside)[0]

    expected = loss(0, 1.0)
    assert expected.isfinite() and torch.equal(loss(V + 5, float("nan")), expected)


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("DPO", {"compute_nll_loss": True}),
        ("KTO", {}),
        ("GRPO", {"importance_sampling_level": "sequence"}),
        ("GRPO", {"loss_type": "vespo"}),
    ],
)
def test_a_compiled_call_is_one_graph(loss: str, options: dict[str, Any]) -> None:
    torch.compiler.reset()
    given, module = tensors(), getattr(ours, named(loss))(**options)
    compiled = torch.compile(lambda: call(module, given)[0], fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(), call(module, given)[0])
