"""The outcomes of a top-K distillation: a teacher's K ids, and all other ids together, which are the tail.

Teacher and student are distributions q and p over K + 1 outcomes. With a_k = z[id_k] for the student's K
logits and a_tail = logsumexp of its other logits,

    log p = a - logsumexp(a) over the K + 1 outcomes,

so p's tail has all its digits however small it is: it is no difference of two larger numbers. q's tail is
1 - sum of q, taken as log1mexp. All of this is in fp64: where p is near q, a divergence is a small sum of
large terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..softmax.rows import accumulator_dtype
from ..torch_func import unwrapped
from .inputs import check_weight_shape
from .options import HeadOptions

# A teacher's mass may exceed 1 by the rounding of its log-probabilities: about 1 % in bf16.
LARGEST_MASS = 1.05


class Teacher(NamedTuple):
    """A teacher's distribution of some tokens."""

    given: Tensor  # [C, K] bool: entries that are outcomes, not padding
    columns: Tensor  # [C, K] int64 in [0, V); padding repeats the row's first outcome
    logp: Tensor  # [C, K + 1] fp64, the tail's last; -inf for padding and for a mass of 0
    eps: float  # rounding of a mass near 1 in the dtype of the given log-probabilities, fp32 or wider

    @classmethod
    def of(cls, ids: Tensor, given_logp: Tensor, vocab_size: int) -> Teacher:
        """The distribution with these ids (int64, -1 for padding) and log-probabilities, both [C, K].

        Where the K masses sum to more than 1, by rounding, or the tail has no ids, they are divided by their
        sum and the tail's mass is 0.
        """
        given = ids >= 0
        logp = torch.where(given, given_logp.double(), -math.inf)
        log_mass = logp.logsumexp(-1, keepdim=True)
        whole = (log_mass >= 0) | (given.sum(-1, keepdim=True) == vocab_size)
        below = torch.where(whole, -1.0, log_mass)  # -1: any number below 0
        tail = torch.where(below > -math.log(2), (-below.expm1()).log(), (-below.exp()).log1p())
        tail = torch.where(whole, -math.inf, tail)
        logp = torch.cat([torch.where(whole, logp - log_mass, logp), tail], -1)
        columns = torch.where(given, ids, first_outcome(given, ids).clamp(min=0))
        return cls(given, columns, logp, torch.finfo(accumulator_dtype(given_logp.dtype)).eps)


def first_outcome(given: Tensor, values: Tensor) -> Tensor:
    """The values [..., 1] of the first entry of each token that is given; of the first where none is."""
    return values.gather(-1, given.int().argmax(-1, keepdim=True))


def check_teacher(
    hidden: Tensor, weight: Tensor, teacher_ids: Tensor, teacher_logp: Tensor, options: HeadOptions
) -> Tensor:
    """teacher_ids [..., K] as int64, contiguous, with -1 for padding.

    Raises:
        ValueError: a wrong shape, dtype or device; where values are `readable`, an id out of range or twice,
            or a mass above 1.
    """
    checks.tensors(hidden=hidden, weight=weight, teacher_ids=teacher_ids, teacher_logp=teacher_logp)
    checks.dtype("teacher_ids", teacher_ids, checks.INTEGERS)
    checks.dtype("teacher_logp", teacher_logp, checks.FLOATS)
    check_weight_shape(weight, options)
    leading = list(hidden.shape[:-1])
    V = options.shards.vocab_size if options.shards else weight.shape[0]
    if teacher_ids.dim() != hidden.dim() or [*teacher_ids.shape[:-1]] != leading:
        raise ValueError(
            f"teacher_ids: got shape {list(teacher_ids.shape)}, expected [..., K] beside hidden's "
            f"{list(hidden.shape)}"
        )
    K = teacher_ids.shape[-1]
    if not 1 <= K <= V:
        raise ValueError(f"teacher_ids: got {K} ids a token, expected 1 to {V}, the ids of weight")
    checks.shape("teacher_logp", teacher_logp, tuple(teacher_ids.shape), "the shape of teacher_ids")
    checks.device("teacher_ids", teacher_ids, "hidden", hidden)
    checks.device("teacher_logp", teacher_logp, "hidden", hidden)
    checks.ids("teacher_ids", teacher_ids, V, options.ignore_index, options.check)
    ids = teacher_ids.long()
    ids = torch.where(ids == options.ignore_index, -1, ids).contiguous()
    if checks.readable(ids, options.check):
        _check_values(unwrapped(ids), unwrapped(teacher_logp).detach())
    return ids


def _check_values(ids: Tensor, logp: Tensor) -> None:
    """Refuse an id that is given twice, and a mass above 1."""
    ordered = ids.sort(-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if twice.any():
        place = twice.nonzero()[0].tolist()
        token_id = int(ordered[..., 1:][tuple(place)])
        raise ValueError(f"teacher_ids: got id {token_id} twice at {place[:-1]}, expected different ids")
    mass = torch.where(ids >= 0, logp.double().exp(), 0.0).sum(-1)
    if (mass > LARGEST_MASS).any():
        place = (mass > LARGEST_MASS).nonzero()[0].tolist()
        raise ValueError(
            f"teacher_logp: got a mass of {mass[tuple(place)].item():.6g} at {place}, expected at most 1: "
            "log-probabilities in nats"
        )


# Divergences: log p [C, K + 1] and log q [C, K + 1] -> the divergence [C], and its gradient by the student's
# unnormalised log masses a [C, K + 1]. A mass of 0 counts 0.
Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _weighted(log_mass: Tensor, value: Tensor) -> Tensor:
    """exp(log_mass) * value, 0 where the mass is 0."""
    return torch.where(log_mass == -math.inf, 0.0, log_mass.exp() * value)


def forward_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q | p) = sum q (log q - log p);  d/da = p sum(q) - q."""
    loss = _weighted(log_q, log_q - log_p).sum(-1)
    q = log_q.exp()
    return loss, log_p.exp() * q.sum(-1, keepdim=True) - q


def reverse_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p | q) = sum p (log p - log q);  d/da = p (log p - log q - KL)."""
    log_ratio = log_p - log_q
    loss = _weighted(log_p, log_ratio).sum(-1)
    return loss, _weighted(log_p, log_ratio - loss[:, None])


def jsd(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """(KL(q | m) + KL(p | m)) / 2 with m = (p + q) / 2;  d/da = p (h - sum p h), h = (log p - log m) / 2."""
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    half = (log_p - log_m) / 2
    of_student = _weighted(log_p, half).sum(-1)
    loss = of_student + _weighted(log_q, log_q - log_m).sum(-1) / 2
    return loss, _weighted(log_p, half - of_student[:, None])


DIVERGENCES: dict[str, Divergence] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}


def with_floor(divergence: str, teacher: Teacher, vocab_size: int) -> Tensor:
    """log q [C, K + 1] for a divergence: in reverse_kl a tail that has ids has at least fp32's eps.

    A teacher's fp32 log-probabilities do not know a smaller tail: their rounding makes it 0, and KL(p | q)
    infinite. fp64's know it down to fp64's eps.
    """
    if divergence != "reverse_kl":
        return teacher.logp
    logp = teacher.logp.clone()
    has_ids = teacher.given.sum(-1) < vocab_size
    logp[:, -1] = torch.where(has_ids, logp[:, -1].clamp(min=math.log(teacher.eps)), logp[:, -1])
    return logp
