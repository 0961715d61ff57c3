"""Liger's JSD on two heads: against Liger's chunked loss on a CPU, and against the formula in fp64."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.experiments.liger_distillation_cases import OPTIONS, N, V, call, expected_loss, formula, heads
from fastalign.integrations.liger import LigerFusedLinearJSD, LigerFusedLinearJSDLoss, LigerJSD


def grads(loss: Tensor, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(2 * loss, [given[name] for name in ("h", "w", "b")])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chunk_size", [4, 1024])
def test_values_and_gradients_are_the_formulas_in_fp64(options: dict[str, Any], chunk_size: int) -> None:
    given = heads()
    value = call(LigerFusedLinearJSDLoss(**options, chunk_size=chunk_size), given)
    expected = expected_loss(given, options)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grads(value, given), grads(expected, given), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("options", OPTIONS)
def test_values_and_gradients_are_ligers_own(options: dict[str, Any]) -> None:
    theirs = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    given = heads(torch.float32)
    modules = [LigerFusedLinearJSDLoss, theirs.LigerFusedLinearJSDLoss]
    ours, other = (
        call(module(**options, compiled=False, return_soft_hard_loss=True), given) for module in modules
    )
    torch.testing.assert_close(ours, other, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(grads(ours[0], given), grads(other[0], given), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("labelled", [True, False])
def test_the_divergence_alone(labelled: bool) -> None:
    given = heads()
    if not labelled:
        given["labels"] = torch.zeros(N, dtype=torch.long)
    arguments = [given[name] for name in ("h", "w", "th", "tw")]
    value = LigerFusedLinearJSD(temperature=1.5)(*arguments, given["labels"] if labelled else None)
    expected = formula(given, 0.5, 1.5, bias=False)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(x, arguments[:2]) for x in (value, expected)))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_divergence_of_log_probabilities(beta: float) -> None:
    given = heads()
    student, teacher = (
        (given[hidden] @ given[weight].T).log_softmax(-1) for hidden, weight in (("h", "w"), ("th", "tw"))
    )
    value = LigerJSD(beta)(student, teacher, given["labels"])
    expected = formula(given, beta, 1.0, bias=False)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        *(torch.autograd.grad(x, given["h"], retain_graph=True) for x in (value, expected))
    )
    everywhere = LigerJSD(beta)(student, teacher)
    torch.testing.assert_close(
        everywhere, formula(given | {"labels": torch.zeros(N, dtype=torch.long)}, beta, 1.0, bias=False)
    )


def test_nan_in_ignored_tokens_reaches_nothing() -> None:
    given = heads()
    given["labels"][0] = -100
    expected = call(LigerFusedLinearJSDLoss(), given)
    with torch.no_grad():
        given["h"][0], given["th"][0] = torch.nan, torch.nan
    value = call(LigerFusedLinearJSDLoss(), given)
    torch.testing.assert_close(value, expected)
    assert all(torch.isfinite(grad).all() for grad in grads(value, given))
    log_q = torch.randn(3, 5, dtype=torch.float64).log_softmax(-1)
    log_q[0] = torch.nan
    log_q.requires_grad_()
    value = LigerJSD()(log_q, log_q.detach().roll(1, 1), torch.tensor([-100, 1, 2]))
    (grad,) = torch.autograd.grad(value, log_q)
    assert torch.isfinite(value) and torch.isfinite(grad).all() and not grad[0].any()


def test_a_batch_of_ignored_labels_is_0() -> None:
    given = heads()
    given["labels"] = torch.full((N,), -100)
    value = call(LigerFusedLinearJSDLoss(), given)
    assert value == 0 and not any(grad.any() for grad in grads(value, given))


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (LigerFusedLinearJSDLoss, {"beta": 1.1}, r"^beta: got 1.1, expected a number in \[0, 1\]"),
        (LigerJSD, {"beta": 1.5}, r"^beta: got 1.5, expected a number in \[0, 1\]"),
        (LigerFusedLinearJSD, {"jsd_beta": -0.1}, r"^jsd_beta: got -0.1, expected a number in \[0, 1\]"),
        (LigerFusedLinearJSD, {"accum_dtype": torch.bfloat16}, "^accum_dtype: got torch.bfloat16, expected"),
    ],
)
def test_what_is_not_served_is_refused_by_name(module: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_a_teacher_with_another_vocabulary_is_refused() -> None:
    given = heads()
    given["tw"] = torch.cat([given["tw"], given["tw"][:1]])
    given["tb"] = torch.zeros(V + 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="^teacher_weight: got 32 rows, expected student_weight's, 31"):
        call(LigerFusedLinearJSDLoss(), given)


def test_the_constructors_and_the_call_orders_are_ligers() -> None:
    chunked = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    modules = pytest.importorskip("liger_kernel.transformers", reason="liger-kernel is not installed")
    for ours, theirs in (
        (LigerFusedLinearJSDLoss, chunked.LigerFusedLinearJSDLoss),
        (LigerFusedLinearJSD, modules.LigerFusedLinearJSD),
        (LigerJSD, modules.LigerJSD),
    ):
        for a, b in ((ours, theirs), (ours.forward, theirs.forward)):
            assert [(p.name, p.default) for p in inspect.signature(a).parameters.values()] == [
                (p.name, p.default) for p in inspect.signature(b).parameters.values()
            ]


def test_a_compiled_call_is_one_graph() -> None:
    torch.compiler.reset()
    given = heads(torch.float32)
    module = LigerFusedLinearJSDLoss(chunk_size=5)
    compiled = torch.compile(lambda: call(module, given), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(), call(module, given))
    torch.testing.assert_close(grads(compiled(), given), grads(call(module, given), given))
