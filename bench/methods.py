"""The table of methods of each operation: ours, plain PyTorch, the peers, and the ceilings that no method can
pass.

What a method is, operation.py says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastalign
from fastalign_kernels.gemm import mm, own_gemm

from . import smollm2
from .head_methods import HEAD_ROWS, apple_cce, eager_logprobs, head_inputs, liger_scaled, trl_chunked
from .operation import (
    COMPILED,
    EAGER,
    OURS,
    Absent,
    Ceiling,
    Forward,
    Operation,
    Shape,
    Tensors,
    compiled,
    here,
    module,
    needs_gpu,
)
from .policy_methods import POLICY
from .ppo_methods import PPO
from .preference_methods import PREFERENCE
from .sampling_methods import SAMPLING
from .step_methods import STEPS
from .tail_methods import TAIL

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
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape.N, shape.V, generator=generator).mul_(2)
    return {
        "logits": logits.to(device, dtype),
        "ids": torch.randint(0, shape.V, (shape.N,), generator=generator).to(device),
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

OPERATIONS = {
    "linear_cross_entropy": LINEAR_CROSS_ENTROPY,
    "linear_cross_entropy, SmolLM2's softmax": LINEAR_CROSS_ENTROPY._replace(inputs=smollm2.head_inputs),
    "linear_logprobs": LINEAR_LOGPROBS,
    "token_stats": TOKEN_STATS,
    "cross_entropy": CROSS_ENTROPY,
    **PREFERENCE,
    **POLICY,
    **SAMPLING,
    **PPO,
    **STEPS,
    **TAIL,
}


# Ceilings: the part of the work that no method can leave out.


def bare_gemms(
    forward: int, hidden_grad: bool = False, weight_grad: bool = False, ours: bool = False
) -> Ceiling:
    """The GEMMs of a head and nothing between them, on whole matrices: torch's, or what gemm.py takes, in
    memory made beforehand."""

    def make(tensors: Tensors) -> Callable[[], object]:
        x, w = tensors["hidden"].detach(), tensors["weight"].detach()
        (N, H), V = x.shape, w.shape[0]

        def fresh() -> object:
            for _ in range(forward):
                z = x @ w.t()
            return (
                z
                if not hidden_grad and not weight_grad
                else (z @ w if hidden_grad else None, z.t() @ x if weight_grad else None)
            )

        if not ours:
            return fresh
        dtype = torch.float32 if own_gemm(x.device, x.dtype) else x.dtype
        z, dx, dw = (x.new_empty(shape, dtype=dtype) for shape in ((N, V), (N, H), (V, H)))

        def reusing() -> object:
            for _ in range(forward):
                mm(x, w.t(), z)
            if hidden_grad:
                mm(z, w, dx)
            if weight_grad:
                mm(z.t(), x, dw)
            return None

        return reusing

    return make


def read_write(tensors: Tensors) -> Callable[[], object]:
    """One read and one write of every input."""
    own = [tensor.detach() for tensor in tensors.values()]
    return lambda: [tensor.clone() for tensor in own]


def one_read(tensors: Tensors) -> Callable[[], object]:
    """One read of the logits: the largest of each row."""
    logits = tensors["logits"].detach()
    return lambda: logits.amax(-1)


def read_read_write(tensors: Tensors) -> Callable[[], object]:
    """One read of the logits, then one read and one write of as much: a loss and its gradient."""
    logits = tensors["logits"].detach()
    return lambda: (logits.amax(-1), logits.clone())
