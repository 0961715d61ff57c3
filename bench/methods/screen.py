"""screen=True on a trained model's softmax, next to exact logits and to tail_eps.

A screen's log-probabilities are approximations, so they have a measure of their own: the largest absolute
error in nats, and the L2 norm of the errors over that of the truth. They are wrong above ALLOWED.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import fastalign
from fastalign_kernels.gemm_int8 import refusal

from ..core import smollm2
from ..core.operation import EAGER, OURS, Absent, Forward, Operation, Shape, Tensors, here
from .head import HEAD_ROWS, eager_logprobs, head_inputs
from .tail import ROWS_AT_ONCE, SMALL, cross_entropy_truth, eager_cross_entropy, within

ALLOWED = 0.001
SCREENED = f"{OURS}, screen"
BOTH = f"{OURS}, screen, tail_eps 2**-14"


def _cross_entropy(*, screen: bool, tail_eps: float | None = None) -> Forward:
    return lambda hidden, weight, ids: {
        "loss": fastalign.linear_cross_entropy(hidden, weight, ids, tail_eps=tail_eps, screen=screen)
    }


def _logprobs(*, screen: bool) -> Forward:
    return lambda hidden, weight, ids: {"logp": fastalign.linear_logprobs(hidden, weight, ids, screen=screen)}


def _on_cpus(forward: Forward) -> Callable[[str], Forward]:
    """The loader of a screened method, for a machine with 8-bit products."""

    def load(device: str) -> Forward:
        if reason := refusal(torch.device(device), torch.float32):
            raise Absent(reason)
        return forward

    return load


def _logprobs_truth(tensors: Tensors) -> dict[str, Tensor]:
    """Plain PyTorch in fp64, some tokens at a time."""
    weight = tensors["weight"].double()
    parts = zip(*(tensors[name].split(ROWS_AT_ONCE) for name in ("hidden", "ids")))
    return {"logp": torch.cat([eager_logprobs(x.double(), weight, ids)["logp"] for x, ids in parts])}


def _without_gradients(inputs: Callable[[Shape, torch.dtype, str], dict[str, Tensor]]) -> Operation:
    return Operation(
        inputs,
        {
            OURS: here(_logprobs(screen=False)),
            SCREENED: _on_cpus(_logprobs(screen=True)),
            EAGER: here(eager_logprobs),
        },
        HEAD_ROWS,
        check=within(_logprobs_truth, ALLOWED),
    )


def untrained_inputs(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Logits of a standard deviation of 0.1, as those of a model before its training."""
    tensors = head_inputs(shape, dtype, device)
    return tensors | {"hidden": tensors["hidden"] * 0.05}


SCREEN = {
    "linear_cross_entropy, screen": Operation(
        smollm2.head_inputs,
        {
            OURS: here(_cross_entropy(screen=False)),
            SMALL: here(_cross_entropy(screen=False, tail_eps=2**-14)),
            SCREENED: _on_cpus(_cross_entropy(screen=True)),
            BOTH: _on_cpus(_cross_entropy(screen=True, tail_eps=2**-14)),
            EAGER: here(eager_cross_entropy),
        },
        HEAD_ROWS,
        check=within(cross_entropy_truth),
    ),
    "linear_logprobs, screen": _without_gradients(smollm2.head_inputs),
    "linear_logprobs, screen, untrained": _without_gradients(untrained_inputs),
}
