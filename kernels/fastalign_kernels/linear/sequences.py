"""What losses of whole sequences on the head share: rows, the reference's log-probabilities, gradients.

The gradient of a token's log-probability is its sequence's, d loss / d logps[row]. It is known as soon as the
log-probabilities of its pair (DPO) or its row (KTO) are summed:

    mode         GEMMs                when
    groups       (2 n - 1) / n + 2    on a CPU, for a pair or row of n chunks: 3 where it fits the workspace
    general      1 + 2                on a GPU, where the host does not know the lengths without waiting:
                 or 2 + 2             statistics of all tokens first, then gradients; 1 + 2 for tokens whose
                                      softmax the workspace holds
    tail         1 + 2 f              statistics first; the share f of the columns is saved (tail_saved.py)
    frozen_head  2                    the head's weight is not trained (`linear_logprobs`)

and 1 GEMM for the reference's log-probabilities. All modes but the tail's agree to rounding. None holds more
logits than the workspace, however long a sequence is.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .. import checks
from ..sequences import check_cu_seqlens, sum_by_sequence
from ..softmax.rows import Stat, coefficients
from . import engines
from .engine import Sequences
from .inputs import HeadInputs, HeadOptions, NeedsGrad, head_inputs
from .logprobs import logprobs
from .plan import default_workspace_mib


class SequenceLoss(Protocol):
    """A loss as a function of its sequences' log-probabilities (preference/on_sequences.py)."""

    def losses_and_grads(self, logps: Tensor) -> tuple[Tensor, Tensor]:
        """losses [S], and d mean loss / d logps [R]."""


class Rows(NamedTuple):
    """Packed rows: where each begins and ends, and how many a loss takes together."""

    cu_seqlens: Tensor  # [R + 1]
    number: int  # R
    group: int  # 2 for pairs, of which row g and row R / 2 + g belong together; else 1

    @classmethod
    def of(cls, ids: Tensor, cu_seqlens: Tensor | None, *, group: int, check: bool) -> Rows:
        """From ids [R, T], or [N] with cu_seqlens."""
        checks.tensors(ids=ids)
        checks.optional_tensors(cu_seqlens=cu_seqlens)
        if cu_seqlens is None:
            if ids.dim() != 2:
                raise ValueError(
                    f"ids: got shape {list(ids.shape)}, expected [rows, T], or [N] with cu_seqlens"
                )
            R, T = ids.shape
            cu_seqlens = torch.arange(R + 1, device=ids.device) * T
        else:
            check_cu_seqlens(cu_seqlens, "ids", ids, check)
        R = cu_seqlens.numel() - 1
        if R % group:
            raise ValueError(f"ids: got {R} rows, expected the chosen ones and then as many rejected ones")
        return cls(cu_seqlens, R, group)

    def sums(self, values: Tensor) -> Tensor:
        """Sums [R] of per-token values [N]."""
        return sum_by_sequence(values, self.cu_seqlens)

    def lengths(self, ids: Tensor) -> Tensor:
        """Tokens [R] that are not ignored."""
        return self.sums((ids >= 0).float()).long()

    def logps(self, inputs: HeadInputs) -> Tensor:
        """Log-probabilities [R], differentiable."""
        return self.sums(logprobs(inputs))


class Reference(NamedTuple):
    """The reference model: its hidden states and head, or its log-probabilities."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    logps: Tensor | None


def reference_logps(
    reference: Reference, rows: Rows, ids: Tensor, options: HeadOptions, *, ignore_index: int | None
) -> Tensor:
    """Log-probabilities [R] under the reference, without gradient.

    Raises:
        ValueError: both or neither of its hidden states and its log-probabilities are given, or one of the
            wrong shape, dtype or device.
    """
    checks.optional_tensors(**{f"reference_{name}": x for name, x in reference._asdict().items()})
    hidden, weight, bias, logps = reference
    if hidden is not None and logps is not None:
        raise ValueError("reference_hidden, reference_logps: got both, expected one of them")
    if logps is not None:
        checks.shape("reference_logps", logps, (rows.number,), "[rows]")
        checks.dtype("reference_logps", logps, checks.FLOATS)
        checks.device("reference_logps", logps, "ids", ids)
        return logps.detach()
    if hidden is None:
        raise ValueError("reference_hidden, reference_logps: got neither, expected one of them")
    if weight is None:
        raise ValueError("reference_weight: got None with reference_hidden, expected [V, H]")
    with torch.no_grad():
        # The ids' range was checked for the policy.
        inputs = head_inputs(hidden, weight, ids, bias, options, ignore_index=ignore_index, check=False)
        return rows.logps(inputs)


def runs_in_forward(inputs: HeadInputs) -> bool:
    """Whether forward computes the gradients: the head is trained.

    Not in fp16, whose small gradients need the loss scale that arrives with the upstream gradient.
    """
    return inputs.needs_grad().head and inputs.hidden.dtype != torch.float16


def with_row_workspace(inputs: HeadInputs) -> HeadInputs:
    """On a CPU 96 MiB by default also beside dW: rows of 512 tokens of V = 49152 fit whole."""
    if inputs.options.workspace_mib is not None or inputs.hidden.device.type != "cpu":
        return inputs
    mib = default_workspace_mib("cpu", weight_grad=False)
    return inputs._replace(options=inputs.options._replace(workspace_mib=mib))


def loss_and_gradients(
    inputs: HeadInputs, rows: Rows, loss: SequenceLoss, needs: NeedsGrad
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Mean loss, log-probabilities [R], and the gradients of hidden, weight and bias."""
    inputs = inputs.lean()
    counts = rows.cu_seqlens.diff()
    numbers = torch.arange(rows.number, device=counts.device)
    row_of = torch.repeat_interleave(numbers, counts, output_size=inputs.ids.shape[0])

    def of_tokens(stats: Tensor, tokens: Tensor | slice) -> Tensor:
        # Rows whose statistics are still to come are sums of nothing here. Their gradient is not read.
        grads = loss.losses_and_grads(rows.sums(stats[Stat.LOGP]))[1]
        grad = torch.zeros_like(stats[:, tokens])
        grad[Stat.LOGP] = grads[row_of[tokens]]
        return coefficients(grad, stats[:, tokens], inputs.vocab_size)

    groups = rows.number // rows.group
    members = [tuple(range(first, rows.number, groups)) for first in range(groups)]
    stats, grads = engines.of_sequences(inputs, of_tokens, Sequences(rows.cu_seqlens, members), needs)
    logps = rows.sums(stats[Stat.LOGP])
    return loss.losses_and_grads(logps)[0].mean(), logps, *grads
