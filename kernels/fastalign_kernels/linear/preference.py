"""DPO and KTO from hidden states, without the logits in memory."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..autograd import register_loss_op
from ..preference import on_sequences
from ..preference.arguments import pair_options, scalar_kl, unpaired_options
from ..preference.formulas import PAIR_LOSSES
from ..preference.losses import dpo_loss, kto_loss
from ..softmax.rows import accumulator_dtype
from .engine import empty_gradients
from .inputs import HeadInputs, NeedsGrad, head_inputs, head_options
from .sequences import (
    Reference,
    Rows,
    loss_and_gradients,
    runs_in_forward,
    with_row_workspace,
)
from .sequences import (
    reference_logps as logps_of_reference,
)


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


def _pairs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    reference: Tensor,
    lengths: Tensor | None,
    loss_type: str,
    options: list[float],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Mean loss over S pairs, log-probabilities [2S], and gradients.

    options: beta, label_smoothing, and those of the head.
    """
    beta, label_smoothing, *numbers = options
    inputs = HeadInputs.of(hidden, weight, ids, bias, numbers)
    loss = on_sequences.PairLoss(reference, lengths, loss_type, beta, label_smoothing)
    rows = Rows(cu_seqlens, reference.shape[0], group=2)
    return loss_and_gradients(inputs, rows, loss, NeedsGrad(*needs))


def _fake_pairs(hidden, weight, ids, bias, cu_seqlens, reference, lengths, loss_type, options, needs):
    return _fake_loss(HeadInputs.of(hidden, weight, ids, bias, options[2:]), reference, needs)


def _unpaired(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    reference: Tensor,
    desirable: Tensor,
    kl: Tensor | None,
    options: list[float],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Mean loss over S completions, log-probabilities [S], and gradients.

    options: beta, desirable_weight, undesirable_weight, and those of the head.
    """
    beta, desirable_weight, undesirable_weight, *numbers = options
    inputs = HeadInputs.of(hidden, weight, ids, bias, numbers)
    loss = on_sequences.UnpairedLoss(reference, desirable, kl, beta, desirable_weight, undesirable_weight)
    rows = Rows(cu_seqlens, reference.shape[0], group=1)
    return loss_and_gradients(inputs, rows, loss, NeedsGrad(*needs))


def _fake_unpaired(hidden, weight, ids, bias, cu_seqlens, reference, desirable, kl, options, needs):
    return _fake_loss(HeadInputs.of(hidden, weight, ids, bias, options[3:]), reference, needs)


def _fake_loss(inputs: HeadInputs, reference: Tensor, needs: list[bool]):
    loss = inputs.hidden.new_empty((), dtype=accumulator_dtype(inputs.hidden.dtype))
    return loss, loss.new_empty(reference.shape[0]), *empty_gradients(inputs, NeedsGrad(*needs))


_head_pairs = register_loss_op(
    "head_pairs",
    _pairs,
    _fake_pairs,
    differentiable=("hidden", "weight", "bias"),
    losses="linear_dpo_loss",
)
_head_unpaired = register_loss_op(
    "head_unpaired",
    _unpaired,
    _fake_unpaired,
    differentiable=("hidden", "weight", "bias"),
    losses="linear_kto_loss",
)


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
    """`dpo_loss` of S pairs from hidden states, with exact gradients and without the logits in memory.

    Args:
        hidden: [2S, T, H], the S chosen rows first and then the rejected ones in the same order; or packed
            [N, H] with cu_seqlens [2S + 1]. hidden[t] predicts ids[t]: shift before. dtypes as in
            `linear_cross_entropy`.
        weight, bias: [V, H], [V].
        ids: [2S, T] or [N]; ignore_index where a token is not scored (prompt, padding).
        reference_hidden, reference_weight, reference_bias: the reference model's, of the same layout; or
        reference_logps: [2S], its log-probabilities, where they are known.
        beta, loss_type, label_smoothing: as in `dpo_loss`. Where the loss takes means over tokens, the tokens
            are counted here.
        workspace_mib: as in `linear_cross_entropy`, but 96 by default on any CPU. On a CPU a pair whose
            logits (4 V bytes a token) fit costs 4 GEMMs, the reference's included. A pair whose logits
            need n times the workspace costs 1 - 1 / n of a GEMM more. At V = 49152 a pair of 512 tokens each
            needs 192.
        The others as in `linear_cross_entropy`.

    Returns:
        The mean loss with gradients of hidden, weight and bias; rewards and log-probabilities without.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range, or is no option's name.
    """
    beta, label_smoothing = pair_options(loss_type, beta, label_smoothing)
    options = head_options(
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        tail_eps=tail_eps,
        workspace_mib=workspace_mib,
    )
    rows = Rows.of(ids, cu_seqlens, group=2, check=check)
    inputs = head_inputs(hidden, weight, ids, bias, options, ignore_index=ignore_index, check=check)
    reference = logps_of_reference(
        Reference(reference_hidden, reference_weight, reference_bias, reference_logps),
        rows,
        ids,
        options,
        ignore_index=ignore_index,
    )
    lengths = rows.lengths(inputs.ids) if PAIR_LOSSES[loss_type].lengths == "needed" else None
    S = rows.number // 2
    if runs_in_forward(inputs):
        inputs = with_row_workspace(inputs)
        loss, logps, *_ = _head_pairs(
            *inputs.tensors,
            rows.cu_seqlens,
            reference.to(accumulator_dtype(inputs.hidden.dtype)),
            lengths,
            loss_type,
            [beta, label_smoothing, *inputs.options.numbers()],
            list(inputs.needs_grad()),
        )
    else:
        logps = rows.logps(inputs)
        loss = dpo_loss(
            logps[:S],
            logps[S:],
            reference[:S],
            reference[S:],
            beta=beta,
            loss_type=loss_type,
            label_smoothing=label_smoothing,
            chosen_lengths=None if lengths is None else lengths[:S],
            rejected_lengths=None if lengths is None else lengths[S:],
        ).loss
        logps = logps.detach()
    rewards = beta * (logps - reference)
    return LinearPreferenceLoss(loss, rewards[:S], rewards[S:], logps[:S], logps[S:])


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
    """`kto_loss` of S completions from hidden states, exact, without the logits in memory.

    Args:
        hidden: [S, T, H], or packed [N, H] with cu_seqlens [S + 1].
        desirable: [S] bool.
        kl: scalar >= 0 of `kto_kl`.
        beta, loss_type, desirable_weight, undesirable_weight: as in `kto_loss`.
        The others, and errors, as in `linear_dpo_loss`.
    """
    beta, desirable_weight, undesirable_weight = unpaired_options(
        loss_type, beta, desirable_weight, undesirable_weight
    )
    options = head_options(
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        tail_eps=tail_eps,
        workspace_mib=workspace_mib,
    )
    rows = Rows.of(ids, cu_seqlens, group=1, check=check)
    inputs = head_inputs(hidden, weight, ids, bias, options, ignore_index=ignore_index, check=check)
    reference = logps_of_reference(
        Reference(reference_hidden, reference_weight, reference_bias, reference_logps),
        rows,
        ids,
        options,
        ignore_index=ignore_index,
    )

    def of_logps(logps: Tensor) -> Tensor:
        return kto_loss(
            logps,
            reference,
            desirable,
            kl,
            beta=beta,
            desirable_weight=desirable_weight,
            undesirable_weight=undesirable_weight,
            loss_type=loss_type,
        ).loss

    of_logps(reference)  # refuses desirable and kl before the head runs
    if runs_in_forward(inputs):
        inputs = with_row_workspace(inputs)
        loss, logps, *_ = _head_unpaired(
            *inputs.tensors,
            rows.cu_seqlens,
            reference.to(accumulator_dtype(inputs.hidden.dtype)),
            desirable,
            None if kl is None or loss_type != "kto" else scalar_kl(kl),
            [beta, desirable_weight, undesirable_weight, *inputs.options.numbers()],
            list(inputs.needs_grad()),
        )
    else:
        logps = rows.logps(inputs)
        loss, logps = of_logps(logps), logps.detach()
    return LinearUnpairedLoss(loss, beta * (logps - reference), logps)
