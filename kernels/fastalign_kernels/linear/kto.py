"""KTO from hidden states, without the logits in memory. sequences.py has its modes and their GEMMs."""

from __future__ import annotations

from typing import NamedTuple, Unpack

from torch import Tensor

from ..autograd import register_loss_op
from ..preference.arguments import scalar_kl, unpaired_options
from ..preference.losses import kto_loss
from ..preference.on_sequences import UnpairedLoss
from . import engines
from .inputs import HEAD, HeadInputs, NeedsGrad
from .sequences import Rows, SequenceArguments, empty_outputs, sequence_call, sequence_keywords


class LinearUnpairedLoss(NamedTuple):
    """loss: scalar; without gradient, [S]: rewards beta * log-ratio, and log-probabilities of the completions
    in nats."""

    loss: Tensor
    rewards: Tensor
    logps: Tensor


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
    loss = UnpairedLoss(reference, desirable, kl, *options[:3])
    inputs = HeadInputs.of(hidden, weight, ids, bias, options[3:]).lean()
    rows = Rows(cu_seqlens, reference.shape[0], group=1)
    of_tokens = rows.coefficients(loss, inputs)
    stats, grads = engines.of_sequences(inputs, of_tokens, rows.sequences(), NeedsGrad(*needs))
    return *rows.loss_and_logps(loss, stats), *grads


def _fake_unpaired(hidden, weight, ids, bias, cu_seqlens, reference, desirable, kl, options, needs):
    return empty_outputs(HeadInputs.of(hidden, weight, ids, bias, options[3:]), reference, NeedsGrad(*needs))


_head_unpaired = register_loss_op(
    "head_unpaired", _unpaired, _fake_unpaired, differentiable=HEAD, losses="linear_kto_loss"
)


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
        numbers, needs = [*weights, *call.numbers()], list(call.inputs.needs_grad())
        loss, logps, *_ = _head_unpaired(*call.tensors, desirable, local_kl, numbers, needs)
    else:
        logps = call.logps()
        loss, logps = mean_loss(logps), logps.detach()
    return LinearUnpairedLoss(loss, beta * (logps - call.reference), logps)
