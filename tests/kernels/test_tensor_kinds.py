"""Tensors that are not what their shape and dtype say: refused in one line that names the argument."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastalign_kernels import linear_cross_entropy, linear_logprobs

N, H, V = 6, 4, 10
HIDDEN, WEIGHT = torch.ones(N, H), torch.ones(V, H)
IDS = torch.arange(N)


class Quantised(torch.Tensor):
    """As torchao's: of the shape and dtype of the weight, which it computes where an op needs it."""

    int8: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> Quantised:
        made: Quantised = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)
        made.int8 = values
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["int8"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(f"no {function} of a quantised tensor")


def resharded() -> Tensor:
    """What FSDP leaves of a gathered weight."""
    weight = WEIGHT.clone()
    weight.untyped_storage().resize_(0)
    return weight


def of_inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


def nested(layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor([HIDDEN[:2], HIDDEN[2:]], layout=layout)


TRAINED = {"hidden": HIDDEN.clone().requires_grad_()}
KINDS: dict[str, tuple[Callable[[], dict[str, Tensor]], str]] = {
    "quantised weight": (
        lambda: {"weight": Quantised(WEIGHT.to(torch.int8))},
        "weight: got a Quantised, expected a plain tensor: dequantise",
    ),
    "quantised hidden": (lambda: {"hidden": Quantised(HIDDEN.to(torch.int8))}, "hidden: got a Quantised"),
    "4-bit weight": (
        lambda: {"weight": torch.zeros(V * H // 2, 1, dtype=torch.uint8)},
        "weight: got torch.uint8, expected floating point; dequantise a quantised weight",
    ),
    "FSDP1 or ZeRO-3": (
        lambda: {"weight": WEIGHT.new_empty(0)},
        r"weight: got shape \[0\], expected \[V, H\]; gather one that FSDP1 or ZeRO-3 has partitioned",
    ),
    "freed weight": (lambda: {"weight": resharded()}, "weight: got a tensor whose memory was freed"),
    "jagged": (lambda: {"hidden": nested(torch.jagged)}, "hidden: got a nested tensor, .* pad a nested one"),
    "nested": (lambda: {"hidden": nested(torch.strided)}, "hidden: got a nested tensor"),
    "masked": (
        lambda: {"hidden": torch.masked.masked_tensor(HIDDEN, HIDDEN > 0)},
        "hidden: got a MaskedTensor, expected a plain tensor",
    ),
    "hidden of inference": (
        lambda: {"hidden": of_inference(HIDDEN), "weight": WEIGHT.clone().requires_grad_()},
        r"hidden: got a tensor that was made in inference mode, .* expected another: hidden.clone\(\)",
    ),
    "ids of inference": (lambda: {"ids": of_inference(IDS), **TRAINED}, "ids: got a tensor that was made in"),
}


@pytest.mark.filterwarnings(
    "ignore:The PyTorch API of (nested|Masked)", "ignore:It is not recommended to create"
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_tensor_is_refused_by_name(kind: str) -> None:
    make, message = KINDS[kind]
    given = {"hidden": HIDDEN, "weight": WEIGHT, "ids": IDS, **make()}
    with pytest.raises(ValueError, match=message) as error:
        linear_logprobs(given["hidden"], given["weight"], given["ids"])
    assert "\n" not in str(error.value)


def test_a_quantised_weight_is_refused_in_compiled_code() -> None:
    weight = Quantised(WEIGHT.to(torch.int8))
    with pytest.raises(ValueError, match="weight: got a Quantised"):
        torch.compile(linear_logprobs, backend="eager")(HIDDEN, weight, IDS)


def test_meta_tensors_have_a_backward_pass() -> None:
    hidden, weight = (x.to("meta").requires_grad_() for x in (HIDDEN, WEIGHT))
    linear_cross_entropy(hidden, weight, IDS.to("meta")).backward()
    assert hidden.grad is not None and hidden.grad.is_meta
