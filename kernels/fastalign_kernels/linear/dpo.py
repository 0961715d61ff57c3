"""DPO from hidden states, without the logits in memory. sequences.py has its modes and their GEMMs."""

from __future__ import annotations

from typing import NamedTuple, Unpack

from torch import Tensor

from ..autograd import register_loss_op
from ..preference.arguments import pair_options
from ..preference.formulas import PAIR_LOSSES
from ..preference.on_sequences import PairLoss
from . import engines
from .inputs import HEAD, HeadInputs, NeedsGrad
from .sequences import Rows, SequenceArguments, empty_outputs, sequence_call, sequence_keywords


class LinearPreferenceLoss(NamedTuple):
    """loss: scalar; without gradient, [S]: rewards beta * log-ratio, and log-probabilities of the completions
    in nats."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor


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
    inputs = HeadInputs.of(hidden, weight, ids, bias, numbers).lean()
    rows = Rows(cu_seqlens, reference.shape[0], group=2)
    loss = PairLoss(reference, lengths, loss_type, beta, label_smoothing)
    of_tokens = rows.coefficients(loss, inputs)
    stats, grads = engines.of_sequences(inputs, of_tokens, rows.sequences(), NeedsGrad(*needs))
    return *rows.loss_and_logps(loss, stats), *grads


def _fake_pairs(hidden, weight, ids, bias, cu_seqlens, reference, lengths, loss_type, options, needs):
    return empty_outputs(HeadInputs.of(hidden, weight, ids, bias, options[2:]), reference, NeedsGrad(*needs))


_head_pairs = register_loss_op(
    "head_pairs", _pairs, _fake_pairs, differentiable=HEAD, losses="linear_dpo_loss"
)


@sequence_keywords
def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None = None,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    **arguments: Unpack[SequenceArguments],
) -> LinearPreferenceLoss:
    """`dpo_loss` of S pairs from hidden states, with exact gradients and without the logits in memory.

    If the head is trained, workspace_mib is 96 by default on any CPU. There a pair whose logits (4 V bytes a
    token) fit costs 4 GEMMs, the reference's included. A pair whose logits need n times the workspace costs
    1 - 1 / n of a GEMM more. At V = 49152 a pair of 512 tokens each needs 192.

    Args:
        hidden: [2S, T, H], the S chosen rows first and then the rejected ones in the same order; or packed
            [N, H] with cu_seqlens [2S + 1]. hidden[t] predicts ids[t]: shift before.
        weight, bias: [V, H], [V].
        ids: [2S, T] or [N]; ignore_index where a token is not scored (prompt, padding).
        beta, loss_type, label_smoothing: as in `dpo_loss`. Where the loss takes means over tokens, the tokens
            are counted here.
        **arguments: `SequenceArguments` documents these keywords.

    Returns:
        The mean loss with gradients of hidden, weight and bias; rewards and log-probabilities without.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range, or is no option's name.
    """
    beta, label_smoothing = pair_options(loss_type, beta, label_smoothing)
    call = sequence_call(linear_dpo_loss, (hidden, weight, ids, bias), arguments, group=2)
    lengths = call.rows.lengths(call.inputs.ids) if PAIR_LOSSES[loss_type].lengths == "needed" else None
    if call.in_forward:
        numbers = [beta, label_smoothing, *call.numbers()]
        needs = list(call.inputs.needs_grad())
        loss, logps, *_ = _head_pairs(*call.tensors, lengths, loss_type, numbers, needs)
    else:
        of_pairs = PairLoss(call.reference, lengths, loss_type, beta, label_smoothing)
        logps = call.logps()
        loss, logps = of_pairs.mean_loss(logps), logps.detach()
    rewards = beta * (logps - call.reference)
    S = call.rows.number // 2
    return LinearPreferenceLoss(loss, rewards[:S], rewards[S:], logps[:S], logps[S:])
