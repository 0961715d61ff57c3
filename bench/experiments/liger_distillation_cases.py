"""Inputs, options and the formula in fp64 of Liger's JSD, for `host_values` and the tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

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


OPTIONS: list[dict[str, Any]] = [
    {"beta": 0.5},
    {"beta": 0.1},
    {"beta": 0.0, "temperature": 2.0},
    {"beta": 1.0, "weight_hard_loss": 0.2},
    {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0},
]


def expected_loss(given: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    """The loss of `LigerFusedLinearJSDLoss(**options)`."""
    hard = F.cross_entropy(given["h"] @ given["w"].T + given["b"], given["labels"])
    soft = formula(given, options.get("beta", 0.5), options.get("temperature", 1.0))
    return options.get("weight_hard_loss", 0.5) * hard + options.get("weight_soft_loss", 0.5) * soft
