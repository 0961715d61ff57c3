"""Liger's cross-entropy classes against their formulas in fp64. Liger's own kernels need a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.experiments.liger_cross_entropy_cases import (
    CLASS_WEIGHTS,
    OPTIONS,
    N,
    V,
    head,
)
from bench.experiments.liger_cross_entropy_cases import cross_entropy_formula as formula
from fastalign.integrations.liger import (
    CrossEntropyOutput,
    LigerCrossEntropyLoss,
    LigerFusedLinearCrossEntropyLoss,
)


def assert_same(result: Any, expected: dict[str, Tensor], inputs: list[Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(
            getattr(result, name).double(), value.double(), rtol=1e-10, atol=1e-10, msg=name
        )
    upstream = torch.linspace(1, 2, result.loss.numel(), dtype=torch.float64).view(result.loss.shape)
    grads = [torch.autograd.grad(loss, inputs, upstream) for loss in (result.loss, expected["loss"])]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", OPTIONS)
def test_values_and_gradients_are_ligers(name: str, reduction: str) -> None:
    given, options = head(), {**OPTIONS[name], "reduction": reduction}
    expected = formula(given["_input"] @ given["lin_weight"].T + given["bias"], given["target"], **options)
    returned: dict[str, Any] = {"return_z_loss": True, "return_token_accuracy": True}
    result = LigerFusedLinearCrossEntropyLoss(**options, **returned)(*given.values())
    assert isinstance(result, CrossEntropyOutput) and result.predicted_tokens is None
    assert result.z_loss is not None and not result.z_loss.requires_grad
    assert_same(result, expected, [given[name] for name in ("lin_weight", "_input", "bias")])
    bare = LigerFusedLinearCrossEntropyLoss(**options)(*given.values())
    torch.testing.assert_close(bare, result.loss)
    if "use_token_scaling" in options:
        return
    logits = torch.randn(N, V, dtype=torch.float64, requires_grad=True)
    options["weight"] = options.pop("ce_weight", None)
    from_logits = LigerCrossEntropyLoss(**options, **returned, return_predicted_tokens=True)
    options["ce_weight"] = options.pop("weight")
    result = from_logits(logits, given["target"])
    assert_same(result, formula(logits, given["target"], **options), [logits])
    assert torch.equal(result.predicted_tokens, logits.argmax(-1).where(given["target"] >= 0, -1))


@pytest.mark.parametrize("weights", [None, CLASS_WEIGHTS])
def test_the_mean_of_no_token_is_0_as_in_liger(weights: Tensor | None) -> None:
    given = {**head(), "target": torch.full((N,), -100)}
    cases: list[dict[str, Any]] = [{}, {"label_smoothing": 0.1, "lse_square_scale": 0.1}]
    for options in cases:
        assert LigerFusedLinearCrossEntropyLoss(weights, **options)(*given.values()) == 0


def test_options_by_position() -> None:
    given = head()
    by_position = LigerFusedLinearCrossEntropyLoss(
        None, 3, 0.1, 0.2, "sum", 4.0, True, torch.float32, True, True
    )
    by_name = LigerFusedLinearCrossEntropyLoss(
        ignore_index=3,
        lse_square_scale=0.1,
        label_smoothing=0.2,
        reduction="sum",
        softcap=4.0,
        return_z_loss=True,
        use_token_scaling=True,
        return_token_accuracy=True,
    )
    given["target"] = given["target"].where(given["target"] >= 0, 3)
    assert by_position(*given.values()) == by_name(*given.values())


def test_bf16_gradients_are_summed_in_fp32() -> None:
    given = head(torch.bfloat16)
    exact = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    for value in exact.values():
        value.detach_().requires_grad_(value.is_floating_point())
    expected = formula(exact["_input"] @ exact["lin_weight"].T + exact["bias"], exact["target"])["loss"]
    loss = LigerFusedLinearCrossEntropyLoss()(*given.values())
    assert loss.dtype == torch.float32 and (loss - expected).abs() < 1e-6
    (ours,) = torch.autograd.grad(loss, given["lin_weight"])
    (theirs,) = torch.autograd.grad(expected, exact["lin_weight"])
    assert (ours - theirs).abs().max() <= 2**-8 * theirs.abs().max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"return_predicted_tokens": True},
            "^return_predicted_tokens: got True, expected False",
        ),
        ({"accum_dtype": torch.bfloat16}, "^accum_dtype: got torch.bfloat16, expected None or torch.float32"),
        ({"reduction": "average"}, "^reduction: got 'average', expected 'mean', 'sum' or 'none'"),
        (
            {"ce_weight": CLASS_WEIGHTS, "label_smoothing": 0.1, "softcap": 3.0},
            "^softcap: got 3.0",
        ),
    ],
)
def test_what_is_not_served_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LigerFusedLinearCrossEntropyLoss(**options)


def test_the_names_and_constructors_are_ligers() -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    import inspect

    from liger_kernel import transformers as theirs

    for kind in (LigerFusedLinearCrossEntropyLoss, LigerCrossEntropyLoss):
        original = getattr(theirs, kind.__name__)
        assert list(inspect.signature(original).parameters) == list(inspect.signature(kind).parameters)
        assert [*inspect.signature(original.forward).parameters] == [
            *inspect.signature(kind.forward).parameters
        ]
