"""torch's names and conventions: values and gradients against torch's formulas in fp64."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign.integrations.torch import LinearCrossEntropyLoss, linear_cross_entropy

N, H, C = 6, 5, 11
PLACES = [(), (3,), (2, 2)]
has_torchs = hasattr(F, "linear_cross_entropy")


def case(places: tuple[int, ...], soft: bool, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    torch.manual_seed(0)
    target = torch.randint(C, (N, *places)).index_fill(0, torch.tensor([2]), -100)
    if soft:
        target = torch.randn(N, C, *places, dtype=dtype).softmax(1)
    return {
        "input": torch.randn(N, H, dtype=dtype, requires_grad=True),
        "linear_weight": torch.randn(C, *places, H, dtype=dtype, requires_grad=True),
        "linear_bias": torch.randn(C, *places, dtype=dtype, requires_grad=True),
        "target": target,
    }


def formula(*, input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Any, **options: Any):  # noqa: A002
    """torch's reference: the logits [N, C, ...] of a linear map, and F.cross_entropy."""
    logits = torch.tensordot(input, linear_weight, dims=([-1], [-1]))
    return F.cross_entropy(logits if linear_bias is None else logits + linear_bias, target, **options)


def assert_same(given: dict[str, Any], **options: Any) -> None:
    """Value and gradients are torch's to fp64's rounding."""
    names = ("input", "linear_weight", "linear_bias")
    results = [function(**given, **options) for function in (linear_cross_entropy, formula)]
    ours, theirs = results
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    upstream = torch.linspace(1, 2, ours.numel(), dtype=ours.dtype).view(ours.shape)
    inputs = [given[name] for name in names if given[name] is not None]
    grads = [torch.autograd.grad(result, inputs, upstream) for result in results]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("places", PLACES)
def test_values_and_gradients_are_torchs(places: tuple[int, ...], soft: bool, reduction: str) -> None:
    given = case(places, soft)
    class_weights = torch.rand(C, dtype=torch.float64)
    for weight, label_smoothing in product((None, class_weights), (0.0, 0.1)):
        assert_same(given, weight=weight, label_smoothing=label_smoothing, reduction=reduction)
    given["linear_bias"] = None
    assert_same(given, weight=class_weights, label_smoothing=0.1, reduction=reduction)


@pytest.mark.parametrize("ignore_index", [3, -1])
def test_another_index_is_ignored(ignore_index: int) -> None:
    given = case((3,), soft=False)
    given["target"] = given["target"].where(given["target"] >= 0, ignore_index)
    assert_same(given, ignore_index=ignore_index)


@pytest.mark.parametrize("soft", [False, True])
def test_the_input_may_have_no_batch(soft: bool) -> None:
    given = case((), soft)
    given["input"] = torch.randn(H, dtype=torch.float64, requires_grad=True)
    given["target"] = given["target"][0]
    for reduction in ("mean", "none"):
        assert_same(given, reduction=reduction, weight=torch.rand(C, dtype=torch.float64))


@pytest.mark.parametrize("places", [(), (3,)])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_mean_of_no_target_is_nan(places: tuple[int, ...], weighted: bool) -> None:
    given = case(places, soft=False)
    given["target"] = torch.full_like(given["target"], -100)
    weight = torch.rand(C, dtype=torch.float64) if weighted else None
    assert linear_cross_entropy(**given, weight=weight).isnan()
    assert linear_cross_entropy(**given, weight=weight, label_smoothing=0.1).isnan()


def test_bf16_is_nearer_to_fp64_than_torchs_logits() -> None:
    given = case((), soft=False, dtype=torch.bfloat16)
    exact = formula(**{k: v.double() if v.is_floating_point() else v for k, v in given.items()})
    ours, theirs = linear_cross_entropy(**given), formula(**given)
    assert ours.dtype == torch.float32
    assert (ours - exact).abs() < 1e-6 < (theirs - exact).abs()


@pytest.mark.skipif(not has_torchs, reason="F.linear_cross_entropy is in torch 2.13 and newer")
@pytest.mark.parametrize("chunk", [None, 2])
def test_torchs_options_do_not_change_the_value(chunk: int | None) -> None:
    settings: dict[str, Any] = {"chunking_method": None, "batch_chunk_size": chunk} if chunk else {}
    options = torch.nn.LinearCrossEntropyOptions(**settings)
    given = case((), soft=False)
    torchs = F.linear_cross_entropy
    ours, theirs = (function(**given, options=options) for function in (linear_cross_entropy, torchs))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.skipif(not has_torchs, reason="nn.LinearCrossEntropyLoss is in torch 2.13 and newer")
def test_the_module_is_torchs() -> None:
    import inspect

    theirs_class: Any = torch.nn.LinearCrossEntropyLoss
    names = [list(inspect.signature(kind).parameters) for kind in (LinearCrossEntropyLoss, theirs_class)]
    assert names[0] == names[1]
    settings: dict[str, Any] = {"out_features": (3,), "bias": True, "weight": torch.rand(C)}
    ours = LinearCrossEntropyLoss(H, C, **settings)
    theirs = theirs_class(H, C, **settings)
    ours.load_state_dict(theirs.state_dict())
    given = case((3,), soft=False, dtype=torch.float32)
    losses = [module(given["input"], given["target"]) for module in (ours, theirs)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(ours.linear.weight.grad, theirs.linear.weight.grad)


def test_the_module_in_a_constructor_and_a_call() -> None:
    torch.manual_seed(0)
    module = LinearCrossEntropyLoss(H, C)
    hidden, target = torch.randn(N, H), torch.randint(C, (N,))
    expected = F.cross_entropy(hidden @ module.linear.weight.T, target)
    torch.testing.assert_close(module(hidden, target), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.zeros(N, 2, dtype=torch.long)}, r"^target: got shape \[6, 2\], expected indices"),
        ({"target": torch.zeros(N, C, dtype=torch.long)}, "^target: got torch.int64, expected floating"),
        ({"linear_bias": torch.zeros(H)}, r"^linear_bias: got shape \[5\], expected \[11\]"),
        ({"weight": torch.zeros(H)}, r"^weight: got shape \[5\], expected \[C\] = \[11\]"),
        ({"input": torch.zeros(2, N, H)}, r"^input: got shape \[2, 6, 5\], expected \[N, H\]"),
        ({"linear_weight": torch.zeros(C, H + 1)}, "^linear_weight: got shape .*, expected .* H = 5"),
        ({"options": {"batch_chunk_size": 2}}, "^options: got dict, expected torch.nn.LinearCrossEntropyO"),
    ],
)
def test_wrong_arguments_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**case((), soft=False), **change})


def test_an_index_to_ignore_is_refused_beside_probabilities() -> None:
    with pytest.raises(ValueError, match="^ignore_index: got -100 with class probabilities"):
        linear_cross_entropy(**case((), soft=True), ignore_index=-100)


def test_a_compiled_call_is_one_graph() -> None:
    given = case((3,), soft=False)
    weight = torch.rand(C, dtype=torch.float64)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**given, weight=weight), linear_cross_entropy(**given, weight=weight))
