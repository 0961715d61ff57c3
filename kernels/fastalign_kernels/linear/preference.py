"""Losses of whole sequences from hidden states: DPO and KTO through the head, without logits.

The gradient of a token's log-probability is its sequence's alone, d loss / d logps[row], and that is known as
soon as the log-probabilities of its pair (DPO) or its row (KTO) are summed. On a CPU pairs or rows therefore
go one by one (linear/sequence_units.py):

    way          GEMMs                    when
    units        (2 n - 1) / n + dX + dW  on a CPU, for a pair or row of n chunks: 1 + dX + dW where it fits the workspace
    general      2 + dX + dW              on a GPU, where the lengths are not known to the host without waiting: statistics of all tokens
                                          first, then their logits again
    kept         1 + f dX + f dW          with a tail: statistics of all tokens first, of which the share f of columns is kept (linear/tail_saved.py)
    frozen_head  2                        the head's weight is not trained (`linear_logprobs`)

and 1 GEMM for the reference's log-probabilities. All ways but the tail's give the same result, and none holds
more logits than the workspace, however long a sequence is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..autograd import save_loss
from ..logits import kept_ids, sum_by_sequence
from ..preference.formulas import PAIR_LOSSES
from ..preference.losses import (
    dpo_loss,
    kto_loss,
    pair_options,
    pairs_op,
    scalar_kl,
    unpaired_op,
    unpaired_options,
)
from ..softmax.rows import Stat, Transform, accumulator_dtype, coefficients
from ..torch_func import requires_grad
from .accumulate import fake_gradients
from .cross_entropy import head_options, linear_logprobs, prepare, scalar_loss_backward
from .plan import default_workspace_mib
from .sequence_units import sweep_units, unit_chunks
from .tail_saved import sweep_keeping, sweep_kept
from .token_tiles import Head, capturing, sweep


class LinearPreferenceLoss(NamedTuple):
    """loss: scalar; without gradient, [S]: rewards beta * log-ratio, and log-probabilities of the completions
    in nats."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor


class LinearUnpairedLoss(NamedTuple):
    """loss: scalar; without gradient, [S]: rewards beta * log-ratio, and log-probabilities of the completions
    in nats."""

    loss: Tensor
    rewards: Tensor
    logps: Tensor


@torch.library.custom_op("fastalign::head_sequences", mutates_args=())
def _head_sequences(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
    workspace_mib: float | None,
    tail_eps: float | None,
    cu_seqlens: Tensor,
    reference: Tensor,
    desirable: Tensor | None,
    kl: Tensor | None,
    loss_type: str,
    beta: float,
    label_smoothing: float,
    desirable_weight: float,
    undesirable_weight: float,
    hidden_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Mean loss over S, log-probabilities [R] of the rows, and the gradients of hidden, weight and bias.

    Rows: S chosen ones, then S rejected ones (R = 2S); with `desirable` [S] they are KTO's (R = S).
    """
    head = Head(
        hidden, weight, ids, bias, Transform(logit_scale, softcap, temperature), workspace_mib, tail_eps
    )
    wanted = (hidden_grad, weight_grad, bias_grad)
    R = reference.shape[0]
    S = R if desirable is not None else R // 2
    row_of = torch.repeat_interleave(
        torch.arange(R, device=ids.device), cu_seqlens.diff(), output_size=ids.shape[0]
    )
    lengths: tuple[Tensor | None, Tensor | None] = (None, None)
    if desirable is None and PAIR_LOSSES[loss_type].lengths == "needed":
        counts = sum_by_sequence((ids >= 0).to(reference.dtype), cu_seqlens).long()
        lengths = (counts[:S], counts[S:])

    def losses_and_slopes(logps: Tensor) -> tuple[Tensor, Tensor]:
        """losses [S] and d mean loss / d logps [R]."""
        if desirable is not None:
            losses, _, slopes = unpaired_op(
                logps, reference, desirable, kl, beta, desirable_weight, undesirable_weight
            )
        else:
            pairs = (logps[:S], logps[S:], reference[:S], reference[S:])
            losses, _, slopes = pairs_op(*pairs, *lengths, loss_type, beta, label_smoothing, 0.0, 0.0)
        return losses, slopes.flatten() / S

    def token_coefficients(stats: Tensor, index: Tensor | slice, slopes: Tensor) -> Tensor:
        grad = torch.zeros_like(stats)
        grad[Stat.LOGP] = slopes[row_of[index]]
        return coefficients(grad, stats, weight.shape[0])

    def slopes_of(table: Tensor) -> Tensor:
        return losses_and_slopes(sum_by_sequence(table[Stat.LOGP], cu_seqlens))[1]

    def of_units(table: Tensor, stats: Tensor, index: Tensor | slice) -> Tensor:
        return token_coefficients(
            stats, index, slopes_of(table)
        )  # rows of units to come are sums of nothing: not read

    tail = tail_eps is not None and not capturing(ids)
    if tail or ids.is_cuda:
        table, kept = (
            sweep_keeping(head, wanted) if tail else (sweep(head, None, None, (False, False, False))[0], None)
        )
        of_tokens = partial(token_coefficients, slopes=slopes_of(table))
        gradients = (
            sweep(head, table, of_tokens, wanted)[1]
            if kept is None
            else sweep_kept(head, table, kept, of_tokens, wanted)
        )
    else:
        units: list[tuple[int, ...]] = [
            (row,) if desirable is not None else (row, S + row) for row in range(S)
        ]
        table, gradients = sweep_units(
            head, unit_chunks(head, cu_seqlens.tolist(), units, wanted), of_units, wanted
        )
    logps = sum_by_sequence(table[Stat.LOGP], cu_seqlens)
    return losses_and_slopes(logps)[0].mean(), logps, *gradients


@_head_sequences.register_fake
def _(
    hidden,
    weight,
    ids,
    bias,
    logit_scale,
    softcap,
    temperature,
    workspace_mib,
    tail_eps,
    cu_seqlens,
    reference,
    *options,
):
    number = hidden.new_empty((), dtype=accumulator_dtype(hidden.dtype))
    return number, number.new_empty(reference.shape[0]), *fake_gradients(hidden, weight, bias, *options[-3:])


_head_sequences.register_autograd(
    scalar_loss_backward("linear_dpo_loss or linear_kto_loss", _head_sequences),
    setup_context=save_loss,
)


class _Rows(NamedTuple):
    """Packed rows: ids [N] with where they begin and end."""

    hidden: Tensor  # [..., H], leading shape of the ids
    ids: Tensor
    cu_seqlens: Tensor  # [R + 1]
    number: int  # R


def _check_head(weight: Tensor, bias: Tensor | None, options: dict[str, Any]) -> None:
    """What must be known of the head before the reference runs; `prepare` checks the rest."""
    check, numbers = options["check"], {name: value for name, value in options.items() if name != "check"}
    head_options(**numbers)
    checks.flags(check=check)
    checks.tensor("weight", weight)
    checks.optional_tensors(bias=bias)


def _rows_of(hidden: Tensor, ids: Tensor, cu_seqlens: Tensor | None, per_unit: int, check: bool) -> _Rows:
    checks.tensors(hidden=hidden, ids=ids)
    checks.optional_tensors(cu_seqlens=cu_seqlens)
    if cu_seqlens is None:
        if ids.dim() != 2:
            raise ValueError(f"ids: shape {list(ids.shape)} seen, [rows, T] wanted, or [N] with cu_seqlens")
        R, T = ids.shape
        cu_seqlens = (
            torch.arange(0, R * T + 1, T, device=ids.device)
            if T
            else torch.zeros(R + 1, dtype=torch.int64, device=ids.device)
        )
    else:
        checks.cu_seqlens(cu_seqlens, "ids", ids, check)
    R = cu_seqlens.numel() - 1
    if R % per_unit:
        raise ValueError(f"ids: {R} rows seen, the chosen ones and then as many rejected ones wanted")
    return _Rows(hidden, ids, cu_seqlens, R)


def _reference(
    rows: _Rows,
    reference_hidden: Tensor | None,
    reference_weight: Tensor | None,
    reference_bias: Tensor | None,
    reference_logps: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """log-probabilities [R] under the reference, without gradient: given, or from its hidden states."""
    checks.optional_tensors(
        reference_hidden=reference_hidden,
        reference_weight=reference_weight,
        reference_bias=reference_bias,
        reference_logps=reference_logps,
    )
    if reference_hidden is not None and reference_logps is not None:
        raise ValueError("reference_hidden, reference_logps: both seen, one of them wanted")
    if reference_logps is not None:
        checks.shape("reference_logps", reference_logps, (rows.number,), "[rows]")
        checks.dtype("reference_logps", reference_logps, checks.FLOATS)
        checks.device("reference_logps", reference_logps, "ids", rows.ids)
        return reference_logps.detach()
    if reference_hidden is None:
        raise ValueError("reference_hidden, reference_logps: neither seen, one of them wanted")
    if reference_weight is None:
        raise ValueError("reference_weight: None seen with reference_hidden, [V, H] wanted")
    with torch.no_grad():
        logp = linear_logprobs(reference_hidden, reference_weight, rows.ids, reference_bias, **options)
        return sum_by_sequence(logp.reshape(-1), rows.cu_seqlens)


def _in_forward(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the op above runs: a trained head; fp16's small gradients need the loss scale that comes with
    the upstream gradient."""
    trained = requires_grad(weight) or (bias is not None and requires_grad(bias))
    return torch.is_grad_enabled() and trained and hidden.dtype != torch.float16


def _run(
    rows: _Rows,
    weight: Tensor,
    bias: Tensor | None,
    options: dict[str, Any],
    reference: Tensor,
    loss: Callable[[Tensor], Tensor],
    op_options: Sequence[Any],
) -> tuple[Tensor, Tensor]:
    """Mean loss and log-probabilities [R]; `loss` takes the latter, `op_options` say the same to the op."""
    hidden = rows.hidden
    if not _in_forward(hidden, weight, bias):
        logp = linear_logprobs(hidden, weight, rows.ids, bias, **options)
        logps = sum_by_sequence(logp.reshape(-1), rows.cu_seqlens)
        return loss(logps), logps.detach()
    softcap, logit_scale, temperature, ignore_index, tail_eps, workspace_mib, check = (
        options[name] for name in OPTIONS
    )
    if workspace_mib is None and hidden.device.type == "cpu":
        # 96 beside a gradient of the weight too: rows of 512 tokens of V = 49152 fit whole.
        workspace_mib = default_workspace_mib("cpu", weight_grad=False)
    arguments = prepare(
        hidden,
        weight,
        rows.ids,
        "ids",
        bias,
        softcap,
        logit_scale,
        temperature,
        ignore_index,
        tail_eps,
        workspace_mib,
        check,
    )
    wanted = [x is not None and requires_grad(x) for x in (hidden, weight, bias)]
    dtype = accumulator_dtype(arguments[0].dtype)
    total, logps, *_ = _head_sequences(*arguments, rows.cu_seqlens, reference.to(dtype), *op_options, *wanted)
    return total, logps


OPTIONS = ("softcap", "logit_scale", "temperature", "ignore_index", "tail_eps", "workspace_mib", "check")


def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None = None,
    *,
    reference_hidden: Tensor | None = None,
    reference_weight: Tensor | None = None,
    reference_bias: Tensor | None = None,
    reference_logps: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int | None = -100,
    tail_eps: float | None = None,
    workspace_mib: float | None = None,
    check: bool = False,
) -> LinearPreferenceLoss:
    """`dpo_loss` of S pairs from hidden states: mean loss with gradients of hidden, weight and bias, exact,
    without logits in memory.

    Args:
        hidden: [2S, T, H], the S chosen rows first and then the rejected ones in their order; or packed [N, H] with cu_seqlens [2S + 1].
            hidden[t] predicts ids[t]: shift before. dtypes as in `linear_cross_entropy`.
        weight: [V, H]. bias: [V]. ids: [2S, T] or [N]; ignore_index where a token is not scored (prompt, padding).
        reference_hidden, reference_weight, reference_bias: the reference model's, of the same layout; or
        reference_logps: [2S], its log-probabilities, where they are known.
        beta, loss_type, label_smoothing: as in `dpo_loss`; lengths, where the loss takes means over tokens, are counted here.
        workspace_mib: default 512 on a GPU, 96 on a CPU. There a pair whose logits (4 V bytes a token) take n times as much costs 1 - 1 / n
            of a GEMM more than one that fits, which costs 4 with the reference's: at V = 49152 a pair of 512 tokens each wants 192.
        The others as in `linear_cross_entropy`.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device, range or name.
    """
    beta, label_smoothing = pair_options(loss_type, beta, label_smoothing)
    options: dict[str, Any] = dict(
        zip(OPTIONS, (softcap, logit_scale, temperature, ignore_index, tail_eps, workspace_mib, check))
    )
    _check_head(weight, bias, options)
    rows = _rows_of(hidden, ids, cu_seqlens, 2, check)
    reference = _reference(rows, reference_hidden, reference_weight, reference_bias, reference_logps, options)
    S = rows.number // 2
    numbers: dict[str, Any] = {"beta": beta, "loss_type": loss_type, "label_smoothing": label_smoothing}
    if PAIR_LOSSES[loss_type].lengths == "needed":
        counts = sum_by_sequence((kept_ids(ids, ignore_index) >= 0).float(), rows.cu_seqlens).long()
        lengths: dict[str, Any] = {"chosen_lengths": counts[:S], "rejected_lengths": counts[S:]}
    else:
        lengths = {}

    def loss(logps: Tensor) -> Tensor:
        return dpo_loss(logps[:S], logps[S:], reference[:S], reference[S:], **numbers, **lengths).loss

    op_options = (None, None, loss_type, beta, label_smoothing, 1.0, 1.0)
    total, logps = _run(rows, weight, bias, options, reference, loss, op_options)
    rewards = beta * (logps - reference)
    return LinearPreferenceLoss(total, rewards[:S], rewards[S:], logps[:S], logps[S:])


def linear_kto_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    desirable: Tensor,
    kl: Tensor | None,
    bias: Tensor | None = None,
    *,
    reference_hidden: Tensor | None = None,
    reference_weight: Tensor | None = None,
    reference_bias: Tensor | None = None,
    reference_logps: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    beta: float = 0.1,
    loss_type: str = "kto",
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int | None = -100,
    tail_eps: float | None = None,
    workspace_mib: float | None = None,
    check: bool = False,
) -> LinearUnpairedLoss:
    """`kto_loss` of S completions from hidden states [S, T, H], or packed [N, H] with cu_seqlens [S + 1]; see
    `linear_dpo_loss`.

    desirable: [S] bool. kl: scalar >= 0 of `kto_kl`. The weights and loss_type as in `kto_loss`.
    """
    beta, desirable_weight, undesirable_weight = unpaired_options(
        loss_type, beta, desirable_weight, undesirable_weight
    )
    options: dict[str, Any] = dict(
        zip(OPTIONS, (softcap, logit_scale, temperature, ignore_index, tail_eps, workspace_mib, check))
    )
    _check_head(weight, bias, options)
    rows = _rows_of(hidden, ids, cu_seqlens, 1, check)
    reference = _reference(rows, reference_hidden, reference_weight, reference_bias, reference_logps, options)
    numbers: dict[str, Any] = {
        "beta": beta,
        "desirable_weight": desirable_weight,
        "undesirable_weight": undesirable_weight,
        "loss_type": loss_type,
    }

    def loss(logps: Tensor) -> Tensor:
        return kto_loss(logps, reference, desirable, kl, **numbers).loss

    loss(reference)  # refuses desirable and kl before the head runs
    used = None if kl is None or loss_type != "kto" else scalar_kl(kl)
    op_options = (desirable, used, "", beta, 0.0, desirable_weight, undesirable_weight)
    total, logps = _run(rows, weight, bias, options, reference, loss, op_options)
    return LinearUnpairedLoss(total, beta * (logps - reference), logps)
