"""The specifications of the head's losses and statistics: plain PyTorch with full logits, valid in fp64."""

from __future__ import annotations

import math
from typing import Unpack

import torch
from torch import Tensor

from ..logits import TokenStats, kept_ids, loss_scale, reduced, stats_of
from ..logits_ops import token_loss
from ..softmax.rows import row_stats_ref, transform_ref
from .low_rank import LowRank
from .options import REFERENCE_ARGUMENTS, HeadOptions, ReferenceArguments, head_keywords, head_options
from .outcomes import Teacher, with_floor


def logits_ref(hidden: Tensor, weight: Tensor, bias: Tensor | None, lora: LowRank | None = None) -> Tensor:
    """Raw logits [1, N, V] in full; those of weight + scale * B @ A with a LoRA adapter."""
    weight = weight.to(hidden.dtype)
    if lora is not None:
        weight = weight + lora.scale * (lora.B.to(hidden.dtype) @ lora.A.to(hidden.dtype))
    logits = hidden @ weight.t()
    return (logits if bias is None else logits + bias.to(logits.dtype)).reshape(1, -1, weight.shape[0])


def _stats_ref(
    hidden: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None, options: HeadOptions
) -> Tensor:
    """The table [7, N] of softmax/rows.py."""
    kept = kept_ids(ids, options.ignore_index)
    return row_stats_ref(logits_ref(hidden, weight, bias, options.lora), kept, None, options.transform)


@head_keywords
def linear_cross_entropy_ref(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    num_items: float | Tensor | None = None,
    **head: Unpack[ReferenceArguments],
) -> Tensor:
    """The specification of `linear_cross_entropy`."""
    options = head_options(linear_cross_entropy_ref, head, REFERENCE_ARGUMENTS)
    stats = _stats_ref(hidden, weight, targets, bias, options)
    kept = kept_ids(targets, options.ignore_index) >= 0
    scale = loss_scale(kept, reduction, token_weights, num_items, stats.dtype)
    return reduced(token_loss(stats, label_smoothing, z_loss), scale, reduction, num_items, targets.shape)


@head_keywords
def linear_token_stats_ref(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None = None,
    *,
    entropy: bool = True,
    **head: Unpack[ReferenceArguments],
) -> TokenStats:
    """The specification of `linear_token_stats`, and by its first field of `linear_logprobs`."""
    options = head_options(linear_token_stats_ref, head, REFERENCE_ARGUMENTS)
    return stats_of(_stats_ref(hidden, weight, ids, bias, options), ids.shape, entropy)


def kl_ref(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a | b) over the last dimension. A mass of 0 in a counts 0."""
    counted = log_a != -math.inf
    log_a, log_b = torch.where(counted, log_a, 0.0), torch.where(counted, log_b, 0.0)
    return torch.where(counted, log_a.exp() * (log_a - log_b), 0.0).sum(-1)


def divergence_ref(divergence: str, log_p: Tensor, log_q: Tensor) -> Tensor:
    """The divergence of a teacher q and a student p over the last dimension."""
    if divergence == "forward_kl":
        return kl_ref(log_q, log_p)
    if divergence == "reverse_kl":
        return kl_ref(log_p, log_q)
    neither = (log_p == -math.inf) & (log_q == -math.inf)
    log_m = torch.logaddexp(torch.where(neither, 0.0, log_p), torch.where(neither, 0.0, log_q)) - math.log(2)
    return (kl_ref(log_q, log_m) + kl_ref(log_p, log_m)) / 2


@head_keywords
def linear_distillation_loss_ref(
    hidden: Tensor,
    weight: Tensor,
    teacher_ids: Tensor,
    teacher_logp: Tensor,
    bias: Tensor | None = None,
    *,
    divergence: str = "forward_kl",
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    num_items: float | Tensor | None = None,
    **head: Unpack[ReferenceArguments],
) -> Tensor:
    """The specification of `linear_distillation_loss`."""
    options = head_options(linear_distillation_loss_ref, head, REFERENCE_ARGUMENTS)
    z = transform_ref(logits_ref(hidden, weight, bias, options.lora)[0], None, options.transform)
    V, K = weight.shape[0], teacher_ids.shape[-1]
    ids = kept_ids(teacher_ids, options.ignore_index).view(-1, K)
    teacher = Teacher.of(ids, teacher_logp.detach().reshape(-1, K), V)
    # Padding repeats a column: it is an outcome of mass 0.
    outside = torch.ones_like(z, dtype=torch.bool).scatter_(1, teacher.columns, False)
    tail = torch.where(outside, z, -math.inf).logsumexp(1, keepdim=True)
    of_ids = torch.where(teacher.given, z.gather(1, teacher.columns), -math.inf)
    log_p = torch.cat([of_ids, tail], 1).log_softmax(1)
    losses = divergence_ref(divergence, log_p, with_floor(divergence, teacher, V).to(z.dtype))
    counted = teacher.given.any(1)
    losses = torch.where(counted, losses, 0.0)
    scale = loss_scale(counted, reduction, token_weights, num_items, z.dtype)
    return reduced(losses, scale, reduction, num_items, teacher_ids.shape[:-1])


@head_keywords
def linear_kept_stats_ref(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None = None,
    *,
    kept: tuple[Tensor, Tensor],
    **head: Unpack[ReferenceArguments],
) -> tuple[Tensor, Tensor]:
    """The specification of log-probabilities over kept sets, and of the entropy of these softmaxes: [...]."""
    options = head_options(linear_kept_stats_ref, head, REFERENCE_ARGUMENTS)
    z = transform_ref(logits_ref(hidden, weight, bias, options.lora)[0], None, options.transform)
    offsets, kept_ids_ = (x.long() for x in kept)
    rows = torch.arange(z.shape[0], device=z.device).repeat_interleave(offsets.diff())
    inside = torch.zeros_like(z, dtype=torch.bool).index_put_((rows, kept_ids_), torch.tensor(True))
    targets = kept_ids(ids, options.ignore_index)
    at = targets.clamp(min=0)[:, None]
    counted = (targets >= 0) & inside.gather(1, at)[:, 0]
    # An empty set has the softmax over all ids in its place, of which nothing is used.
    logp = torch.where(inside | ~inside.any(1, keepdim=True), z, -math.inf).log_softmax(1)
    entropy = -(logp.exp() * torch.where(inside, logp, 0.0).clamp(min=-1e30)).sum(1)
    missing = torch.where(targets >= 0, -math.inf, 0.0).to(z.dtype)
    of_ids = torch.where(counted, torch.where(counted[:, None], logp, 0.0).gather(1, at)[:, 0], missing)
    entropy = torch.where((targets >= 0) & inside.any(1), entropy, 0.0)
    return of_ids.view(ids.shape), entropy.view(ids.shape)
