"""tail_eps beside exact gradients, on the synthetic head of tail_head.py in bf16."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import fastalign

from ..core.operation import OURS, Shape
from ..methods.tail import EPS
from .case import Call, Calls, GpuCase
from .head_cases import SHAPES, gemms
from .tail_head import Law, synthetic_head

Loss = Callable[[Tensor, Tensor, Tensor, float | None], Tensor]


def _cross_entropy(hidden: Tensor, weight: Tensor, ids: Tensor, tail_eps: float | None) -> Tensor:
    return fastalign.linear_cross_entropy(hidden, weight, ids, tail_eps=tail_eps)


def _logprobs(hidden: Tensor, weight: Tensor, ids: Tensor, tail_eps: float | None) -> Tensor:
    logp = fastalign.linear_logprobs(hidden, weight, ids, tail_eps=tail_eps)
    return (logp * torch.linspace(-1, 1, logp.numel(), device=logp.device)).sum()


def tail_case(loss: Loss, name: str, shape: Shape, *, weight_grad: bool = True) -> GpuCase:
    """A loss with tail_eps, exact and by EPS."""

    def make(shape: Shape, device: str) -> Calls:
        hidden, weight, ids = synthetic_head(shape, Law(), device)
        leaves = (
            (hidden.requires_grad_(), weight.requires_grad_()) if weight_grad else (hidden.requires_grad_(),)
        )

        def run(tail_eps: float | None) -> object:
            return torch.autograd.grad(loss(hidden, weight, ids, tail_eps), leaves)

        ours: dict[str, Call] = {OURS: partial(run, None)}
        ours |= {row: partial(run, eps) for row, eps in EPS.items()}
        tensors = {"hidden": hidden, "weight": weight}
        bare = gemms(1, hidden=True, weight=weight_grad)
        return Calls(ours, {row: ceiling(tensors) for row, ceiling in bare.items()})

    return GpuCase(f"{name} bf16, tail, {shape.N} × {shape.H} × {shape.V}", shape, make)


CASES = (
    *(tail_case(_cross_entropy, "linear_cross_entropy", shape) for shape in SHAPES[:1]),
    *(tail_case(_logprobs, "linear_logprobs", shape) for shape in SHAPES[:1]),
    tail_case(_logprobs, "linear_logprobs, frozen head,", SHAPES[0], weight_grad=False),
    *(tail_case(_cross_entropy, "linear_cross_entropy", shape) for shape in SHAPES[1:]),
)
