"""KTO from hidden states, without the logits in memory. sequences.py has its modes and their GEMMs."""

from __future__ import annotations

from typing import NamedTuple, Unpack

from torch import Tensor

from ..preference.arguments import scalar_kl, unpaired_options
from ..preference.losses import kto_loss
from ..preference.on_sequences import UnpairedLoss
from . import engines
from .head_ops import register_head_loss
from .inputs import HeadInputs, NeedsGrad
from .sequences import Rows, SequenceArguments, empty_outputs, sequence_call, sequence_keywords


class LinearUnpairedLoss(NamedTuple):
    """loss: scalar; without gradient, [S]: rewards beta * log-ratio, and log-probabilities of the completions
    in nats."""

    loss: Tensor
    rewards: Tensor
    logps: Tensor


def _unpaired(
    inputs: HeadInputs,
    needs: NeedsGrad,
    cu_seqlens: Tensor,
    reference: Tensor,
    desirable: Tensor,
    kl: Tensor | None,
    weights: list[float],
) -> tuple[Tensor, ...]:
    """Mean loss over S completions, log-probabilities [S], and gradients.

    weights: beta, desirable_weight, undesirable_weight.
    """
    loss = UnpairedLoss(reference, desirable, kl, *weights)
    rows = Rows(cu_seqlens, reference.shape[0], group=1)
    of_tokens = rows.coefficients(loss, inputs)
    stats, grads = engines.of_sequences(inputs, of_tokens, rows.sequences(), needs)
    return *rows.loss_and_logps(loss, stats), *grads


_head_unpaired = register_head_loss("head_unpaired", _unpaired, empty_outputs, losses="linear_kto_loss")


@sequence_keywords
def linear_kto_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    desirable: Tensor,
    kl: Tensor | None,
    bias: Tensor | None = None,
    *,
    beta: float = 0.1,
    loss_type: str = "kto",
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    **arguments: Unpack[SequenceArguments],
) -> LinearUnpairedLoss:
    """`kto_loss` of S completions from hidden states, exact, without the logits in memory.

    workspace_mib and costs are as in `linear_dpo_loss`, with a row for a pair.

    Args:
        hidden: [S, T, H], or packed [N, H] with cu_seqlens [S + 1]. hidden[t] predicts ids[t].
        weight, bias: [V, H], [V].
        ids: [S, T] or [N]; ignore_index where a token is not scored (prompt, padding).
        desirable: [S] bool.
        kl: scalar >= 0 of `kto_kl`.
        beta, loss_type, desirable_weight, undesirable_weight: as in `kto_loss`.
        **arguments: `SequenceArguments` documents these keywords.

    Returns:
        The mean loss with gradients of hidden, weight and bias; rewards and log-probabilities without.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range, or is no option's name.
    """
    weights = unpaired_options(loss_type, beta, desirable_weight, undesirable_weight)
    beta, desirable_weight, undesirable_weight = weights
    call = sequence_call(linear_kto_loss, (hidden, weight, ids, bias), arguments, group=1)

    def mean_loss(logps: Tensor) -> Tensor:
        return kto_loss(
            logps,
            call.reference,
            desirable,
            kl,
            beta=beta,
            desirable_weight=desirable_weight,
            undesirable_weight=undesirable_weight,
            loss_type=loss_type,
        ).loss

    mean_loss(call.reference)  # refuses desirable and kl before the head runs
    if call.in_forward:
        local_kl = None if kl is None or loss_type != "kto" else scalar_kl(kl)
        loss, logps, *_ = _head_unpaired(*call.arguments(), desirable, local_kl, list(weights))
    else:
        logps = call.logps()
        loss, logps = mean_loss(logps), logps.detach()
    return LinearUnpairedLoss(loss, beta * (logps - call.reference), logps)
