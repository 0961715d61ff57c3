"""tail_eps and a screen beside exact gradients, on the synthetic head of tail_head.py in bf16."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastalign
from fastalign_kernels.linear.gpu.device import no_screen
from fastalign_kernels.linear.gpu.plan import LEAST_SCREENED_HIDDEN

from ..core.operation import OURS, Shape
from ..methods.screen import SCREENED
from ..methods.tail import EPS
from .case import Call, Calls, GpuCase
from .head_cases import SHAPES, gemms
from .tail_head import Law, synthetic_head

Loss = Callable[..., Tensor]  # of hidden, weight, ids and options of the head


def _cross_entropy(hidden: Tensor, weight: Tensor, ids: Tensor, **options: Any) -> Tensor:
    return fastalign.linear_cross_entropy(hidden, weight, ids, **options)


def _logprobs(hidden: Tensor, weight: Tensor, ids: Tensor, **options: Any) -> Tensor:
    logp = fastalign.linear_logprobs(hidden, weight, ids, **options)
    return (logp * torch.linspace(-1, 1, logp.numel(), device=logp.device)).sum()


def _screens(shape: Shape, device: str) -> bool:
    """Whether calls of this shape are screened here."""
    return not no_screen(torch.device(device), torch.bfloat16) and shape.H >= LEAST_SCREENED_HIDDEN


def tail_case(loss: Loss, name: str, shape: Shape, *, weight_grad: bool = True) -> GpuCase:
    """A loss with tail_eps, exact and by EPS."""

    def make(shape: Shape, device: str) -> Calls:
        hidden, weight, ids = synthetic_head(shape, Law(), device)
        leaves = (
            (hidden.requires_grad_(), weight.requires_grad_()) if weight_grad else (hidden.requires_grad_(),)
        )

        def run(**options: Any) -> object:
            return torch.autograd.grad(loss(hidden, weight, ids, **options), leaves)

        ours: dict[str, Call] = {OURS: run}
        ours |= {row: partial(run, tail_eps=eps) for row, eps in EPS.items()}
        if _screens(shape, device):
            screened = {row.replace(OURS, SCREENED): eps for row, eps in EPS.items()}
            ours |= {row: partial(run, tail_eps=eps, screen=True) for row, eps in screened.items()}
        tensors = {"hidden": hidden, "weight": weight}
        bare = gemms(1, hidden=True, weight=weight_grad)
        return Calls(ours, {row: ceiling(tensors) for row, ceiling in bare.items()})

    return GpuCase(f"{name} bf16, tail, {shape.N} × {shape.H} × {shape.V}", shape, make)


def screen_case(shape: Shape) -> GpuCase:
    """Log-probabilities without gradients, exact and with a screen."""

    def make(shape: Shape, device: str) -> Calls:
        hidden, weight, ids = synthetic_head(shape, Law(), device)
        ours: dict[str, Call] = {OURS: partial(fastalign.linear_logprobs, hidden, weight, ids)}
        if _screens(shape, device):
            ours[SCREENED] = partial(fastalign.linear_logprobs, hidden, weight, ids, screen=True)
        bare = gemms(1, hidden=False, weight=False)
        tensors = {"hidden": hidden, "weight": weight}
        return Calls(ours, {row: ceiling(tensors) for row, ceiling in bare.items()})

    name = f"linear_logprobs bf16, screen, no gradients, {shape.N} × {shape.H} × {shape.V}"
    return GpuCase(name, shape, make)


CASES = (
    *(tail_case(_cross_entropy, "linear_cross_entropy", shape) for shape in SHAPES[:1]),
    *(tail_case(_logprobs, "linear_logprobs", shape) for shape in SHAPES[:1]),
    screen_case(SHAPES[0]),
    tail_case(_logprobs, "linear_logprobs, frozen head,", SHAPES[0], weight_grad=False),
    *(tail_case(_cross_entropy, "linear_cross_entropy", shape) for shape in SHAPES[1:]),
)
