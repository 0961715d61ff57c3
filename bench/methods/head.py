"""Shared by operations on hidden states: hidden [N, H], weight [V, H], ids [N] -> each token's log P[id].

cross_entropy.py, preference.py (DPO, KTO) and policy.py (PPO) build their losses on these log-probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.operation import Forward, Shape, module, needs_gpu

HEAD_ROWS = ("hidden", "ids")


def head_inputs(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Random inputs. Logits have a standard deviation of 2: the softmax is neither flat nor on one id."""
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(shape.N, shape.H, generator=generator, device=device)
    weight = torch.randn(shape.V, shape.H, generator=generator, device=device) * (2 / math.sqrt(shape.H))
    ids = torch.randint(0, shape.V, (shape.N,), generator=generator, device=device)
    return {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "ids": ids}


def eager_logprobs(hidden: Tensor, weight: Tensor, ids: Tensor) -> dict[str, Tensor]:
    return {"logp": F.log_softmax(F.linear(hidden, weight), -1).gather(-1, ids[:, None])[:, 0]}


def liger_scaled(device: str) -> Forward:
    """Liger's fused linear Scaled CE. Except on Hopper GPUs it is a loop over 512 tokens in PyTorch."""
    function = module(
        "liger_kernel.ops.fused_linear_scaled_cross_entropy", "liger-kernel"
    ).LigerFusedLinearScaledCrossEntropyFunction
    return lambda hidden, weight, ids: {"logp": -function.apply(hidden, weight, ids)}


def trl_chunked(device: str) -> Forward:
    """TRL with the vocabulary chunk of its trainers. On a CPU PyTorch replaces its Triton kernel."""
    function = module("trl.kernels.chunked_logprob", "trl").ChunkedLogProbFunction
    return lambda hidden, weight, ids: {
        "logp": function.apply(hidden, weight, None, ids, 1.0, 32768, None, 1.0, ())[0]
    }


def apple_cce(filter_eps: str | None) -> Callable[[str], Forward]:
    """Apple's CCE. filter_eps "high" is its default and drops small gradients; None drops none."""

    def load(device: str) -> Forward:
        needs_gpu(device)
        function = module("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy
        return lambda hidden, weight, ids: {
            "logp": -function(hidden, weight, ids, reduction="none", filter_eps=filter_eps)
        }

    return load
