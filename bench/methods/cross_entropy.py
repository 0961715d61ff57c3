"""Cross-entropy, log-probabilities and token statistics from hidden states and from logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastalign

from ..core.operation import (
    COMPILED,
    EAGER,
    OURS,
    Absent,
    Forward,
    Operation,
    Shape,
    compiled,
    here,
    module,
    needs_gpu,
)
from .head import HEAD_ROWS, apple_cce, eager_logprobs, head_inputs, liger_scaled, trl_chunked

# From hidden states: hidden [N, H], weight [V, H], ids [N].


def _ours_cross_entropy(hidden: Tensor, weight: Tensor, ids: Tensor) -> dict[str, Tensor]:
    return {"loss": fastalign.linear_cross_entropy(hidden, weight, ids)}


def _eager_cross_entropy(hidden: Tensor, weight: Tensor, ids: Tensor) -> dict[str, Tensor]:
    return {"loss": F.cross_entropy(F.linear(hidden, weight), ids)}


def _torch_chunked(reduction: str = "mean", **options: Any) -> Callable[[str], Forward]:
    def load(device: str) -> Forward:
        function, make_options = (
            getattr(F, "linear_cross_entropy", None),
            getattr(torch.nn, "LinearCrossEntropyOptions", None),
        )
        if function is None or make_options is None:
            raise Absent(f"torch {torch.__version__} has no chunked linear_cross_entropy; 2.13 has")

        def forward(hidden: Tensor, weight: Tensor, ids: Tensor) -> dict[str, Tensor]:
            loss = function(hidden, weight, ids, reduction=reduction, options=make_options(**options))
            return {"logp": -loss} if reduction == "none" else {"loss": loss}

        return forward

    return load


def _liger_fused(device: str) -> Forward:
    needs_gpu(device)
    loss = module("liger_kernel.transformers", "liger-kernel").LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, ids: {"loss": loss(weight, hidden, ids)}


def _quack(device: str) -> Forward:
    needs_gpu(device, "CuTe")
    function = module("quack.linear_cross_entropy", "quack-kernels").chunked_linear_cross_entropy
    return lambda hidden, weight, ids: {"loss": function(hidden, weight, ids)}


def _ours_logprobs(hidden: Tensor, weight: Tensor, ids: Tensor) -> dict[str, Tensor]:
    return {"logp": fastalign.linear_logprobs(hidden, weight, ids)}


def _mean_loss(load_logprobs: Callable[[str], Forward]) -> Callable[[str], Forward]:
    def load(device: str) -> Forward:
        logprobs = load_logprobs(device)
        return lambda **tensors: {"loss": -logprobs(**tensors)["logp"].mean()}

    return load


CHUNKED = "F.linear_cross_entropy, 512 tokens a chunk"
LINEAR_CROSS_ENTROPY = Operation(
    head_inputs,
    {
        OURS: here(_ours_cross_entropy),
        EAGER: here(_eager_cross_entropy),
        COMPILED: compiled(_eager_cross_entropy),
        "F.linear_cross_entropy, options as torch picks them": _torch_chunked(),
        CHUNKED: _torch_chunked(batch_chunk_size=512, chunking_method=None),
        "TRL ChunkedLogProbFunction": _mean_loss(trl_chunked),
        "Liger fused linear Scaled CE": _mean_loss(liger_scaled),
        "Liger fused linear CE": _liger_fused,
        "Apple CCE": _mean_loss(apple_cce("high")),
        "Apple CCE, exact": _mean_loss(apple_cce(None)),
        "quack chunked linear CE": _quack,
    },
    HEAD_ROWS,
)
LINEAR_LOGPROBS = Operation(
    head_inputs,
    {
        OURS: here(_ours_logprobs),
        EAGER: here(eager_logprobs),
        COMPILED: compiled(eager_logprobs),
        CHUNKED: _torch_chunked("none", batch_chunk_size=512, chunking_method=None),
        "TRL ChunkedLogProbFunction": trl_chunked,
        "Liger fused linear Scaled CE": liger_scaled,
        "Apple CCE, exact": apple_cce(None),
    },
    HEAD_ROWS,
)


# From logits [N, V], ids [N].


def logits_inputs(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(shape.N, shape.V, generator=generator, device=device).mul_(2)
    return {
        "logits": logits.to(dtype),
        "ids": torch.randint(0, shape.V, (shape.N,), generator=generator, device=device),
    }


def _ours_stats(logits: Tensor, ids: Tensor) -> dict[str, Tensor]:
    return fastalign.token_stats(logits, ids)._asdict()


def _eager_logp(logits: Tensor, ids: Tensor) -> dict[str, Tensor]:
    return {"logp": F.log_softmax(logits, -1).gather(-1, ids[:, None])[:, 0]}


def _eager_stats(logits: Tensor, ids: Tensor) -> dict[str, Tensor]:
    logp = F.log_softmax(logits, -1)
    at_id = logits.gather(-1, ids[:, None])[:, 0]
    return {
        "logp": logp.gather(-1, ids[:, None])[:, 0],
        "entropy": -(logp.exp() * logp).sum(-1),
        "lse": logits.logsumexp(-1),
        "top1": at_id >= logits.amax(-1),
    }


def _trl_stats(device: str) -> Forward:
    function = module("trl.trainer.utils", "trl").selective_log_softmax_and_entropy

    def forward(logits: Tensor, ids: Tensor) -> dict[str, Tensor]:
        logp, entropy = function(logits, ids)
        return {"logp": logp, "entropy": entropy}

    return forward


def _ours_loss(logits: Tensor, ids: Tensor) -> dict[str, Tensor]:
    return {"loss": fastalign.cross_entropy(logits, ids)}


def _eager_loss(logits: Tensor, ids: Tensor) -> dict[str, Tensor]:
    return {"loss": F.cross_entropy(logits, ids)}


def _liger_loss(device: str) -> Forward:
    needs_gpu(device)
    loss = module("liger_kernel.transformers", "liger-kernel").LigerCrossEntropyLoss()
    return lambda logits, ids: {"loss": loss(logits, ids)}


def _flash_attn_loss(device: str) -> Forward:
    needs_gpu(device)
    loss = module("flash_attn.losses.cross_entropy", "flash-attn").CrossEntropyLoss()
    return lambda logits, ids: {"loss": loss(logits, ids)}


def _quack_loss(device: str) -> Forward:
    needs_gpu(device, "CuTe")
    function = module("quack.cross_entropy", "quack-kernels").cross_entropy
    return lambda logits, ids: {"loss": function(logits, ids)}


LOGITS_ROWS = ("logits", "ids")
LOGP_ONLY = "PyTorch, log_softmax + gather alone"
TOKEN_STATS = Operation(
    logits_inputs,
    {
        OURS: here(_ours_stats),
        LOGP_ONLY: here(_eager_logp),
        EAGER: here(_eager_stats),
        "torch.compile, log_softmax + gather alone": compiled(_eager_logp),
        COMPILED: compiled(_eager_stats),
        "TRL selective_log_softmax_and_entropy": _trl_stats,
    },
    LOGITS_ROWS,
)
CROSS_ENTROPY = Operation(
    logits_inputs,
    {
        OURS: here(_ours_loss),
        EAGER: here(_eager_loss),
        COMPILED: compiled(_eager_loss),
        "Liger CE": _liger_loss,
        "flash-attn CE": _flash_attn_loss,
        "quack CE": _quack_loss,
    },
    LOGITS_ROWS,
)
