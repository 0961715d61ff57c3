"""DPO from hidden states, without the logits in memory. sequences.py has its modes and their GEMMs."""

from __future__ import annotations

from typing import NamedTuple, Unpack

from torch import Tensor

from ..preference.arguments import pair_options
from ..preference.formulas import PAIR_LOSSES
from ..preference.on_sequences import PairLoss
from . import engines
from .head_ops import register_head_loss
from .inputs import HeadInputs, NeedsGrad
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
    inputs: HeadInputs,
    needs: NeedsGrad,
    cu_seqlens: Tensor,
    reference: Tensor,
    lengths: Tensor | None,
    loss_type: str,
    beta: float,
    label_smoothing: float,
) -> tuple[Tensor, ...]:
    """Mean loss over S pairs, log-probabilities [2S], and gradients."""
    rows = Rows(cu_seqlens, reference.shape[0], group=2)
    loss = PairLoss(reference, lengths, loss_type, beta, label_smoothing)
    of_tokens = rows.coefficients(loss, inputs)
    stats, grads = engines.of_sequences(inputs, of_tokens, rows.sequences(), needs)
    return *rows.loss_and_logps(loss, stats), *grads


_head_pairs = register_head_loss("head_pairs", _pairs, empty_outputs, losses="linear_dpo_loss")


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
        of_pairs = (lengths, loss_type, beta, label_smoothing)
        loss, logps, *_ = _head_pairs(*call.arguments(), *of_pairs)
    else:
        pair_loss = PairLoss(call.reference, lengths, loss_type, beta, label_smoothing)
        logps = call.logps()
        loss, logps = pair_loss.mean_loss(logps), logps.detach()
    rewards = beta * (logps - call.reference)
    S = call.rows.number // 2
    return LinearPreferenceLoss(loss, rewards[:S], rewards[S:], logps[:S], logps[S:])
