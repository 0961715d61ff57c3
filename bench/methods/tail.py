"""tail_eps on a trained model's softmax: cross-entropy and DPO, next to exact gradients and plain PyTorch.

The gradient of tail_eps is an approximation, so these results have a measure of their own. An Error here is
(largest absolute error, L2 norm of the error over that of the truth). A result is wrong if the second is
above ALLOWED.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastalign
from fastalign.measure import Error

from ..core import smollm2
from ..core.operation import EAGER, OURS, Check, Forward, Operation, Shape, Tensors, Verdict, here
from .head import HEAD_ROWS
from .preference import BETA, LIGER_DPO, PREFERENCE, by_row, with_reference

ALLOWED = 0.01
# Factors of the hidden states. "flat": 2**-14 drops all mass. "unsure": most columns are kept. "sure": few
# are.
SHARPNESS = {"flat": 0.01, "unsure": 0.5, "sure": 2.0}
ALLOWED_OF_ANY = 0.05  # for these softmaxes, whose cases are about time
EPS = {f"{OURS}, tail_eps 2**-14": 2**-14, f"{OURS}, tail_eps 2**-12": 2**-12}
SMALL, LARGE = EPS
ROWS_AT_ONCE = 256


def _cross_entropy(tail_eps: float | None) -> Forward:
    return lambda hidden, weight, ids: {
        "loss": fastalign.linear_cross_entropy(hidden, weight, ids, tail_eps=tail_eps)
    }


def eager_cross_entropy(hidden: Tensor, weight: Tensor, ids: Tensor) -> dict[str, Tensor]:
    return {"loss": torch.nn.functional.cross_entropy(hidden @ weight.t(), ids)}


def _dpo(tail_eps: float | None) -> Forward:
    def forward(**tensors: Tensor) -> dict[str, Tensor]:
        hidden, reference, ids = by_row(tensors)
        options: Any = {
            "reference_hidden": reference,
            "reference_weight": tensors["reference_weight"],
            "beta": BETA,
            "tail_eps": tail_eps,
        }
        return {"loss": fastalign.linear_dpo_loss(hidden, tensors["weight"], ids, **options).loss}

    return forward


def _wide(tensors: Tensors) -> dict[str, Tensor]:
    return {
        k: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for k, x in tensors.items()
    }


def _truth(tensors: Tensors, loss: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
    trained = [name for name, tensor in tensors.items() if tensor.requires_grad]
    gradients = torch.autograd.grad(scale * loss, [tensors[name] for name in trained])
    return {"loss": scale * loss.detach(), **{f"d {name}": g for name, g in zip(trained, gradients)}}


def cross_entropy_truth(tensors: Tensors) -> dict[str, Tensor]:
    """Plain PyTorch in fp64, some tokens at a time."""
    wide, N = _wide(tensors), tensors["ids"].numel()
    total: dict[str, Tensor] = {}
    for rows in torch.arange(N).split(ROWS_AT_ONCE):
        loss = eager_cross_entropy(wide["hidden"][rows], wide["weight"], wide["ids"][rows])["loss"]
        share = _truth(wide, loss, len(rows) / N)
        total = {name: value + total[name] if total else value for name, value in share.items()}
    return total


def _dpo_truth(tensors: Tensors) -> dict[str, Tensor]:
    wide, whole = _wide(tensors), PREFERENCE["linear_dpo"].whole
    assert whole is not None
    return _truth(wide, whole(ROWS_AT_ONCE)(**wide)["loss"])


def within(
    truth: Callable[[Tensors], dict[str, Tensor]], allowed: float = ALLOWED
) -> Callable[[Tensors], Check]:
    def make(tensors: Tensors) -> Check:
        true = truth(tensors)

        def check(results: Tensors) -> Verdict:
            errors = {}
            for name, value in results.items():
                off = value.double() - true[name]
                errors[name] = Error(off.abs().max().item(), (off.norm() / true[name].norm()).item())
            wrong = [
                f"{name} is off by {error.relative:.2%}"
                for name, error in errors.items()
                if not error.relative <= allowed
            ]
            return Verdict(errors, f"wrong: {', '.join(wrong)}, {allowed:.0%} allowed" if wrong else "")

        return check

    return make


def dpo_inputs(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    return with_reference(smollm2.head_inputs(shape, dtype, device), dtype, device)


def sharpened(sharpness: float) -> Callable[[Shape, torch.dtype, str], dict[str, Tensor]]:
    def inputs(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        tensors = smollm2.head_inputs(shape, dtype, device)
        return tensors | {"hidden": tensors["hidden"] * sharpness}

    return inputs


TAIL = {
    "linear_cross_entropy, tail": Operation(
        smollm2.head_inputs,
        {
            OURS: here(_cross_entropy(None)),
            **{name: here(_cross_entropy(eps)) for name, eps in EPS.items()},
            EAGER: here(eager_cross_entropy),
        },
        HEAD_ROWS,
        check=within(cross_entropy_truth),
    ),
    **{
        f"linear_cross_entropy, tail, {name}": Operation(
            sharpened(sharpness),
            {
                OURS: here(_cross_entropy(None)),
                **{name: here(_cross_entropy(eps)) for name, eps in EPS.items()},
            },
            HEAD_ROWS,
            check=within(cross_entropy_truth, ALLOWED_OF_ANY),
        )
        for name, sharpness in SHARPNESS.items()
    },
    "linear_dpo, tail": Operation(
        dpo_inputs,
        {
            OURS: here(_dpo(None)),
            **{name: here(_dpo(eps)) for name, eps in EPS.items()},
            **{name: PREFERENCE["linear_dpo"].methods[name] for name in (EAGER, LIGER_DPO)},
        },
        (*HEAD_ROWS, "reference_hidden"),
        check=within(_dpo_truth),
        whole=PREFERENCE["linear_dpo"].whole,
    ),
}
