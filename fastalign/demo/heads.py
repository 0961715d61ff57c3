"""The head's loss beside plain PyTorch: time, memory, and error of the gradients."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastalign_kernels import linear_cross_entropy

from ..measure import PeakMemoryUnavailable, interleaved, largest_error, peak_memory
from .settings import Shape

LossFn = Callable[[Tensor, Tensor, Tensor], Tensor]
ROUNDS = (3, 20)  # of timing, at least and at most
SECONDS = 20.0  # for the rounds of a shape
ROWS_AT_ONCE = 256  # of the fp64 reference


def plain_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy in plain PyTorch, with full logits."""
    return F.cross_entropy(F.linear(hidden, weight), targets)


METHODS: dict[str, LossFn] = {"fastalign": linear_cross_entropy, "plain PyTorch": plain_cross_entropy}


class Head(NamedTuple):
    """One method at one shape, forward and backward. A value that could not be measured is None.

    milliseconds: median. peak_mib: beyond the inputs, gradients included. error: of the gradients, as in
    `measure_heads`.
    """

    shape: Shape
    method: str
    milliseconds: float
    peak_mib: float | None
    error: float


def head_step(method: str, shape: Sequence[int]) -> Callable[[], dict[str, Tensor]]:
    """A method's forward and backward pass at a shape, as a call that returns the gradients."""
    return partial(_gradients, METHODS[method], *_head_inputs(Shape(*shape)))


def _head_inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(shape.N, shape.H, generator=generator)
    # Logits of standard deviation 2
    weight = torch.randn(shape.V, shape.H, generator=generator) * (2 / math.sqrt(shape.H))
    return (
        hidden.requires_grad_(),
        weight.requires_grad_(),
        torch.randint(shape.V, (shape.N,), generator=generator),
    )


def _gradients(loss_fn: LossFn, hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(loss_fn(hidden, weight, targets), (hidden, weight))
    return dict(zip(("hidden", "weight"), gradients, strict=True))


def _true_gradients(shape: Shape) -> dict[str, Tensor]:
    """The gradients by plain PyTorch in fp64, some tokens at a time."""
    hidden, weight, targets = _head_inputs(shape)
    wide = weight.detach().double().requires_grad_()
    total, parts = torch.zeros_like(wide), []
    for begin in range(0, shape.N, ROWS_AT_ONCE):
        rows = slice(begin, begin + ROWS_AT_ONCE)
        part_grads = _gradients(
            plain_cross_entropy, hidden[rows].detach().double().requires_grad_(), wide, targets[rows]
        )
        share = targets[rows].numel() / shape.N  # of the mean over all tokens
        parts.append(part_grads["hidden"] * share)
        total.add_(part_grads["weight"], alpha=share)
    return {"hidden": torch.cat(parts), "weight": total}


def measure_heads(shape: Shape) -> list[Head]:
    """Each method at a shape: time, memory, and the error of its gradients.

    Time is measured in interleaved rounds, memory in a process of its own. The error is against plain
    PyTorch in fp64: the largest elementwise one, as a fraction of the largest gradient, of hidden states or
    weight, whichever is worse.
    """
    steps = {method: head_step(method, shape) for method in METHODS}
    began = time.perf_counter()
    # The first calls also warm up, and their time says how many rounds fit.
    found = {method: step() for method, step in steps.items()}
    rounds = int(SECONDS / (time.perf_counter() - began))
    timings = interleaved(steps, rounds=min(max(rounds, ROUNDS[0]), ROUNDS[1]), warmup=0)
    true = _true_gradients(shape)
    errors = {
        method: max(error.relative for error in largest_error(grads, true).values())
        for method, grads in found.items()
    }
    return [
        Head(shape, method, 1000 * timings[method].median, _peak_mib(method, shape), errors[method])
        for method in METHODS
    ]


def _peak_mib(method: str, shape: Shape) -> float | None:
    call, small = {"method": method, "shape": list(shape)}, {"method": method, "shape": [8, 8, 8]}
    try:
        return peak_memory("fastalign.demo.heads:head_step", call, warmup=small)
    except PeakMemoryUnavailable:
        return None


def head_rows(heads: Iterable[Head]) -> list[list[str]]:
    """Cells of the table of heads."""
    rows = []
    for head in heads:
        peak = "not measured: needs Linux" if head.peak_mib is None else f"{head.peak_mib:,.1f}"
        gradients = (head.shape.N + head.shape.V) * head.shape.H * 4 / 2**20
        rows.append(
            [
                str(head.shape),
                head.method,
                f"{head.milliseconds:,.1f}",
                peak,
                f"{gradients:,.1f}",
                f"{head.error:.1e}",
            ]
        )
    return rows


def memory_text(head: Head) -> str:
    return "" if head.peak_mib is None else f", {head.peak_mib:,.0f} MiB"
