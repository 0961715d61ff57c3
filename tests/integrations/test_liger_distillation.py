"""Liger's JSD on two heads: against Liger's chunked loss on a CPU, and against the formula in fp64."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastalign.integrations.liger import LigerFusedLinearJSD, LigerFusedLinearJSDLoss

N, V = 9, 31


def heads(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(V, (N,))
    labels[2], labels[7] = -100, -100
    trained = {"h": torch.randn(N, 6), "w": torch.randn(V, 6), "b": torch.randn(V)}
    teacher = {"th": torch.randn(N, 4), "tw": torch.randn(V, 4), "tb": torch.randn(V)}
    given = {name: x.to(dtype).requires_grad_() for name, x in trained.items()}
    return given | {name: x.to(dtype) for name, x in teacher.items()} | {"labels": labels}


def formula(given: dict[str, Tensor], beta: float, temperature: float, *, bias: bool = True) -> Tensor:
    """The divergence's mean over the tokens that are not ignored."""
    b, tb = (given["b"] * bias, given["tb"] * bias)
    student = ((given["h"] @ given["w"].T + b) / temperature).log_softmax(-1)
    teacher = ((given["th"] @ given["tw"].T + tb) / temperature).log_softmax(-1)
    if beta in (0, 1):
        p, q = (teacher, student) if beta == 0 else (student, teacher)
        losses = (p.exp() * (p - q)).sum(-1)
    else:
        mean = ((1 - beta) * student.exp() + beta * teacher.exp()).log()
        shares = ((1 - beta, student), (beta, teacher))
        losses = torch.stack([share * (p.exp() * (p - mean)).sum(-1) for share, p in shares]).sum(0)
    return losses[given["labels"] >= 0].mean()


def call(module: Any, given: dict[str, Tensor]) -> Any:
    return module(*(given[name] for name in ("h", "w", "th", "tw", "labels", "b", "tb")))


def grads(loss: Tensor, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(2 * loss, [given[name] for name in ("h", "w", "b")])


OPTIONS = [
    {"beta": 0.5},
    {"beta": 0.1},
    {"beta": 0.0, "temperature": 2.0},
    {"beta": 1.0, "weight_hard_loss": 0.2},
    {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chunk_size", [4, 1024])
def test_values_and_gradients_are_the_formulas_in_fp64(options: dict[str, float], chunk_size: int) -> None:
    given = heads()
    value = call(LigerFusedLinearJSDLoss(**options, chunk_size=chunk_size), given)  # type: ignore[arg-type]
    hard = F.cross_entropy(given["h"] @ given["w"].T + given["b"], given["labels"])
    soft = formula(given, options.get("beta", 0.5), options.get("temperature", 1.0))
    expected = options.get("weight_hard_loss", 0.5) * hard + options.get("weight_soft_loss", 0.5) * soft
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grads(value, given), grads(expected, given), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("options", OPTIONS)
def test_values_and_gradients_are_ligers_own(options: dict[str, float]) -> None:
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


def test_a_batch_of_ignored_labels_is_0() -> None:
    given = heads()
    given["labels"] = torch.full((N,), -100)
    value = call(LigerFusedLinearJSDLoss(), given)
    assert value == 0 and not any(grad.any() for grad in grads(value, given))


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (LigerFusedLinearJSDLoss, {"beta": 1.1}, r"^beta: got 1.1, expected a number in \[0, 1\]"),
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
    ):
        for a, b in ((ours, theirs), (ours.forward, theirs.forward)):
            assert [(p.name, p.default) for p in inspect.signature(a).parameters.values()] == [
                (p.name, p.default) for p in inspect.signature(b).parameters.values()
            ]


def test_a_compiled_call_is_one_graph() -> None:
    torch.compiler.reset()
    given = heads(torch.float32)
    module = LigerFusedLinearJSDLoss(chunk_size=4)
    compiled = torch.compile(lambda: call(module, given), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), call(module, given))
    torch.testing.assert_close(grads(compiled(), given), grads(call(module, given), given))
