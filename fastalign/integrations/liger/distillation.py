"""Liger's distillation: the generalised JSD of a student's and a teacher's whole softmax."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastalign_kernels as fk
from fastalign_kernels import checks

ROWS = 1024  # Liger's default chunk_size


class _Head(NamedTuple):
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]


class LigerFusedLinearJSDLoss(nn.Module):
    """The generalised JSD of two softmaxes over all ids, and `linear_cross_entropy`, with Liger's options.

    With the teacher's P, the student's Q and M = beta P + (1 - beta) Q it is beta KL(P | M) +
    (1 - beta) KL(Q | M); KL(P | Q) for beta 0 and KL(Q | P) for beta 1.

    The logits of `chunk_size` tokens exist at once, in fp32, and are computed a second time in the backward
    pass: 6 GEMMs of 2 N H V flops, where Liger has 4. `linear_distillation_loss` with a teacher's top K ids
    needs no teacher's head and no such logits.

    Args:
        weight_hard_loss, weight_soft_loss: of the cross-entropy with the labels, and of the divergence.
        beta: in [0, 1].
        ignore_index: of labels. Both losses are divided by the number of other labels, at least 1.
        temperature: divides the logits in the divergence.
        compiled: changes no value.
        chunk_size: tokens.
        return_soft_hard_loss: also return both losses, without gradient.
    Raises:
        ValueError: an option that is not served.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = ROWS,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        self.beta = _checked("beta", beta)
        self.weight_hard_loss = weight_hard_loss
        self.weight_soft_loss = weight_soft_loss
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.chunk_size = chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The weighted loss, or it, the divergence and the cross-entropy.

        Args:
            student_input, student_weight, student_bias: [N, H], [V, H], [V].
            teacher_input, teacher_weight, teacher_bias: [N, H'], [V, H'], [V]. Get no gradient.
            true_labels: [N].
        """
        student = _Head(student_input, student_weight, student_bias)
        kept = true_labels != self.ignore_index
        number = kept.sum().clamp(min=1)
        soft = _divergences(
            student,
            _Head(teacher_input, teacher_weight, teacher_bias),
            kept,
            self.beta,
            self.temperature,
            self.chunk_size,
        )
        soft = soft / number
        hard = soft.new_zeros(())
        if self.weight_hard_loss or self.return_soft_hard_loss:
            hard = fk.linear_cross_entropy(
                student_input,
                student_weight,
                true_labels,
                student_bias,
                ignore_index=self.ignore_index,
                num_items=number,
            )
        loss = self.weight_hard_loss * hard + self.weight_soft_loss * soft
        return (loss, soft.detach(), hard.detach()) if self.return_soft_hard_loss else loss


class LigerFusedLinearJSD(nn.Module):
    """The divergence alone, as `LigerFusedLinearJSDLoss` computes it.

    Args:
        jsd_beta, ignore_index, temperature: beta, ignore_index and temperature there.
        accum_dtype: None or fp32, in which fastalign sums anyway.
    Raises:
        ValueError: an option that is not served.
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if accum_dtype not in (None, torch.float32):
            raise ValueError(f"accum_dtype: got {accum_dtype}, expected None or torch.float32")
        self.beta = _checked("jsd_beta", jsd_beta)
        self.ignore_index = ignore_index
        self.temperature = temperature

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None,
    ) -> Tensor:
        """The divergence's mean over the tokens, or over those whose label is not ignored."""
        kept = _kept(student_input, shift_labels, self.ignore_index)
        student, teacher = (
            _Head(student_input, student_weight, None),
            _Head(teacher_input, teacher_weight, None),
        )
        total = _divergences(student, teacher, kept, self.beta, self.temperature, ROWS)
        return total / kept.sum().clamp(min=1)


class LigerJSD(nn.Module):
    """The generalised JSD of log-probabilities in memory, with Liger's options.

    Args:
        beta, ignore_index: as in `LigerFusedLinearJSDLoss`.
    Raises:
        ValueError: a beta outside of [0, 1].
    """

    def __init__(self, beta: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__()
        self.beta = _checked("beta", beta)
        self.ignore_index = ignore_index

    def forward(self, log_q: Tensor, log_p: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        """The mean over the tokens, or over those whose label is not ignored.

        Args:
            log_q, log_p: [N, V] of the student and the teacher. log_p gets no gradient.
            shift_labels: [N].
        """
        kept = _kept(log_q, shift_labels, self.ignore_index)
        dtype = torch.promote_types(log_q.dtype, torch.float32)
        log_p, log_q = (_where(kept, x.to(dtype)) for x in (log_p.detach(), log_q))
        return _jsd(log_p, log_q, self.beta).where(kept, 0).sum() / kept.sum().clamp(min=1)


def _kept(x: Tensor, labels: Tensor | None, ignore_index: int) -> Tensor:
    """[N] bool for x [N, ...]."""
    return torch.ones_like(x[:, 0], dtype=torch.bool) if labels is None else labels != ignore_index


def _where(kept: Tensor, x: Tensor) -> Tensor:
    """x [N, D], 0 outside of kept: a NaN of an ignored token reaches no gradient."""
    return x.where(kept[:, None], 0)


def _checked(name: str, beta: float) -> float:
    if not 0 <= beta <= 1:
        raise ValueError(f"{name}: got {beta}, expected a number in [0, 1]")
    return beta


def _divergences(
    student: _Head, teacher: _Head, kept: Tensor, beta: float, temperature: float, rows: int
) -> Tensor:
    """The sum over the tokens in `kept` [N]."""
    checks.tensors(student_weight=student.weight, teacher_weight=teacher.weight)
    V, teacher_V = len(student.weight), len(teacher.weight)
    if teacher_V != V:
        raise ValueError(f"teacher_weight: got {teacher_V} rows, expected student_weight's, {V}")

    def of_rows(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher_hidden: Tensor, kept: Tensor
    ) -> Tensor:
        with torch.no_grad():
            log_p = _log_softmax(_where(kept, teacher_hidden), teacher.weight, teacher.bias, temperature)
        log_q = _log_softmax(_where(kept, hidden), weight, bias, temperature)
        return _jsd(log_p, log_q, beta).where(kept, 0).sum()

    total = kept.new_zeros((), dtype=torch.promote_types(student.hidden.dtype, torch.float32))
    for hidden, teacher_hidden, chunk in zip(
        student.hidden.split(rows), teacher.hidden.split(rows), kept.split(rows), strict=True
    ):
        given = (hidden, student.weight, student.bias, teacher_hidden, chunk)
        total = total + checkpoint(of_rows, *given, use_reentrant=False, preserve_rng_state=False)
    return total


def _log_softmax(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    return (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)


def _jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """JSD of each token, [n]."""
    if beta == 0:
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if beta == 1:
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
    return (beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)).sum(-1)
