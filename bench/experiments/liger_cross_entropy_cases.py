"""Liger 0.8.5's cross-entropy for `host_values` and the tests: inputs, options, and its formula in fp64."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

N, H, V = 7, 4, 9  # tokens, hidden size, vocabulary


def head(dtype: torch.dtype = torch.float64, tokens: int = N) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "lin_weight": torch.randn(V, H, dtype=dtype, requires_grad=True),
        "_input": torch.randn(tokens, H, dtype=dtype, requires_grad=True),
        "target": torch.randint(V, (tokens,)).index_fill(0, torch.tensor([2, 5]), -100),
        "bias": torch.randn(V, dtype=dtype, requires_grad=True),
    }


def cross_entropy_formula(logits: Tensor, target: Tensor, **options: Any) -> dict[str, Tensor]:
    """What Liger 0.8.5 computes for its options, from logits [N, V]."""
    weights = options.get("ce_weight")
    z_scale, reduction = options.get("lse_square_scale", 0.0), options.get("reduction", "mean")
    if (softcap := options.get("softcap")) is not None:
        logits = softcap * torch.tanh(logits / softcap)
    kept = target != -100
    smoothing = options.get("label_smoothing", 0.0)
    losses = F.cross_entropy(logits, target, weight=weights, label_smoothing=smoothing, reduction="none")
    lse = logits.logsumexp(-1).where(kept, 0)
    count = kept.sum()
    divisor = count if weights is None else weights[target.where(kept, 0)].where(kept, 0).sum()
    z_losses = z_scale * lse**2
    if options.get("use_token_scaling"):
        scaling = logits.softmax(-1).gather(1, target.where(kept, 0)[:, None])[:, 0].detach().where(kept, 0)
        losses, z_losses = losses * scaling, z_losses * scaling
    hits = (logits.argmax(-1) == target).float()
    if reduction == "none":
        return {"loss": losses + z_losses, "z_loss": z_losses, "token_accuracy": hits}
    if reduction == "sum":
        losses, z_losses = losses.sum(), z_losses.sum()
    else:
        losses, z_losses = losses.sum() / divisor, z_losses.sum() / count
    return {"loss": losses + z_losses, "z_loss": z_losses, "token_accuracy": hits.sum() / count}


CLASS_WEIGHTS = torch.rand(V, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "z-loss": {"lse_square_scale": 0.1},
    "smoothing": {"label_smoothing": 0.1},
    "softcap": {"softcap": 3.0, "label_smoothing": 0.1},
    "class weights": {"ce_weight": CLASS_WEIGHTS},
    "class weights, smoothing, z-loss": {
        "ce_weight": CLASS_WEIGHTS,
        "label_smoothing": 0.1,
        "lse_square_scale": 0.1,
    },
    "class weights, softcap, z-loss": {"ce_weight": CLASS_WEIGHTS, "softcap": 3.0, "lse_square_scale": 0.1},
    "token scaling": {"use_token_scaling": True, "lse_square_scale": 0.1},
    "token scaling, class weights": {"use_token_scaling": True, "ce_weight": CLASS_WEIGHTS},
    "token scaling, class weights, z-loss": {
        "use_token_scaling": True,
        "ce_weight": CLASS_WEIGHTS,
        "lse_square_scale": 0.1,
    },
}
