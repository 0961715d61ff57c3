"""What losses of whole sequences on the head share: rows, the reference's log-probabilities, gradients.

The gradient of a token's log-probability is its sequence's, d loss / d logps[row]. It is known as soon as the
log-probabilities of its pair (DPO) or its row (KTO) are summed:

    mode         GEMMs                when
    groups       (2 n - 1) / n + 2    on a CPU, for a pair or row of n chunks: 3 where it fits the workspace
    general      1 + 2                on a GPU, where the host does not know the lengths without waiting:
                 or 2 + 2             statistics of all tokens first, then gradients; 1 + 2 for tokens whose
                                      softmax the workspace holds
    tail         1 + 2 f              statistics first; the share f of the columns is saved (tail_saved.py)
    frozen_head  2                    nothing of the head is trained (`linear_logprobs`)

and 1 GEMM for the reference's log-probabilities. All modes but the tail's agree to rounding. None holds more
logits than the workspace, however long a sequence is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor

from .. import checks
from ..keywords import flat_signature, pick
from ..sequences import check_cu_seqlens, sum_by_sequence
from ..softmax.rows import Stat, accumulator_dtype, coefficients
from .engine import SequenceCoefficients, Sequences, empty_gradients
from .inputs import HeadInputs, NeedsGrad, head_inputs
from .logprobs import logprobs
from .options import HEAD_DEFAULTS, HeadArguments, HeadOptions, head_options
from .plan import default_workspace_mib


class SequenceTensors(TypedDict, total=False):
    """The tensors of a loss of sequences beside those of every head function.

    reference_hidden, reference_weight, reference_bias: the reference model's hidden states, laid out as
        hidden, and its head, to which `lora` adds nothing; or
    reference_logps: [rows], its log-probabilities in nats, where they are known.
    cu_seqlens: [rows + 1], where the rows of packed hidden states [N, H] and ids [N] begin and end. None:
        hidden is [rows, T, H] and ids [rows, T].
    """

    reference_hidden: Tensor | None
    reference_weight: Tensor | None
    reference_bias: Tensor | None
    reference_logps: Tensor | None
    cu_seqlens: Tensor | None


class SequenceArguments(SequenceTensors, HeadArguments, total=False):
    """The keywords of all losses of sequences on the head."""


SEQUENCE_ARGUMENTS = SequenceArguments.__optional_keys__
SEQUENCE_TENSORS = SequenceTensors.__optional_keys__
sequence_keywords = flat_signature(HEAD_DEFAULTS, SequenceTensors.__doc__, HeadArguments.__doc__)


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
        """The rows of ids [R, T], or of ids [N] with cu_seqlens."""
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

    def sequences(self) -> Sequences:
        """The rows as an engine takes them."""
        groups = self.number // self.group
        return Sequences(
            self.cu_seqlens, [tuple(range(first, self.number, groups)) for first in range(groups)]
        )

    def coefficients(self, loss: SequenceLoss, inputs: HeadInputs) -> SequenceCoefficients:
        """The gradient kernel's coefficients for a loss of the rows' log-probabilities."""
        counts = self.cu_seqlens.diff()
        numbers = torch.arange(self.number, device=counts.device)
        row_of = torch.repeat_interleave(numbers, counts, output_size=inputs.ids.shape[0])

        def of_tokens(stats: Tensor, tokens: Tensor | slice) -> Tensor:
            # Rows whose statistics are not computed yet have sums of 0. Their gradient is not read.
            grads = loss.losses_and_grads(self.sums(stats[Stat.LOGP]))[1]
            grad = torch.zeros_like(stats[:, tokens])
            grad[Stat.LOGP] = grads[row_of[tokens]]
            return coefficients(grad, stats[:, tokens], inputs.vocab_size)

        return of_tokens

    def loss_and_logps(self, loss: SequenceLoss, stats: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss, and the log-probabilities [R], of a table [7, N]."""
        logps = self.sums(stats[Stat.LOGP])
        return loss.losses_and_grads(logps)[0].mean(), logps


class SequenceCall(NamedTuple):
    """A loss's inputs, checked."""

    inputs: HeadInputs
    rows: Rows
    reference: Tensor  # [R], log-probabilities under the reference, without gradient

    @property
    def in_forward(self) -> bool:
        """Whether forward computes the gradients: the head or its LoRA adapter is trained.

        Not in fp16, whose small gradients need the loss scale that arrives with the upstream gradient.
        """
        needs = self.inputs.needs_grad()
        return (needs.head or needs.lora) and self.inputs.hidden.dtype != torch.float16

    def arguments(self) -> tuple[HeadInputs, NeedsGrad, Tensor, Tensor]:
        """The first arguments of a loss's op: the last two are cu_seqlens and the reference.

        On a CPU the workspace is by default 96 MiB also beside dW: rows of 512 tokens of V = 49152 fit whole.
        """
        inputs = self.inputs.lean()
        options = inputs.options
        if options.workspace_mib is None and inputs.hidden.device.type == "cpu":
            workspace_mib = default_workspace_mib("cpu", weight_grad=False)
            inputs = inputs._replace(options=options._replace(workspace_mib=workspace_mib))
        reference = self.reference.to(accumulator_dtype(inputs.hidden.dtype))
        return inputs, inputs.needs_grad(), self.rows.cu_seqlens, reference

    def logps(self) -> Tensor:
        """Log-probabilities [R], differentiable."""
        return self.rows.logps(self.inputs)


def sequence_call(
    function: Callable[..., object],
    head: tuple[Tensor, Tensor, Tensor, Tensor | None],
    given: SequenceArguments,
    *,
    group: int,
) -> SequenceCall:
    """Check the tensors of a head (hidden, weight, ids, bias) and the keywords of `function`.

    Raises:
        TypeError: a keyword that the function does not take.
        ValueError: an argument of the wrong shape, dtype, device or range; both or neither of the reference's
            hidden states and log-probabilities.
    """
    options = head_options(function, given, SEQUENCE_ARGUMENTS)
    tensors = pick(given, SEQUENCE_TENSORS)
    ids = head[2]
    rows = Rows.of(ids, tensors.pop("cu_seqlens", None), group=group, check=options.check)
    inputs = head_inputs(*head, options)
    reference = _reference_logps(tensors, rows, ids, options, vocab_size=inputs.vocab_size)
    return SequenceCall(inputs, rows, reference)


def _reference_logps(
    reference: Mapping[str, Tensor | None],
    rows: Rows,
    ids: Tensor,
    options: HeadOptions,
    *,
    vocab_size: int,
) -> Tensor:
    """[R], of reference_logps or of the reference's head. vocab_size: that of the policy."""
    checks.optional_tensors(**reference)
    hidden, logps = reference.get("reference_hidden"), reference.get("reference_logps")
    if logps is not None:
        for name, given in reference.items():
            if given is not None and name != "reference_logps":
                raise ValueError(f"{name}, reference_logps: got both, expected one of them")
        checks.shape("reference_logps", logps, (rows.number,), "[rows]")
        checks.dtype("reference_logps", logps, checks.FLOATS)
        checks.device("reference_logps", logps, "ids", ids)
        return logps.detach()
    if hidden is None:
        raise ValueError("reference_hidden, reference_logps: got neither, expected one of them")
    weight = reference.get("reference_weight")
    if weight is None:
        raise ValueError("reference_weight: got None with reference_hidden, expected [V, H]")
    with torch.no_grad():
        # The ids' range was checked for the policy, and the adapter is the policy's.
        options = options._replace(check=False, lora=None)
        try:
            inputs = head_inputs(hidden, weight, ids, reference.get("reference_bias"), options)
        except ValueError as error:
            raise ValueError(_of_reference(str(error))) from error
    # Whole rows on each rank would count as a vocabulary that is repeated on all of them.
    if options.group is not None and inputs.vocab_size != vocab_size:
        raise ValueError(
            f"reference_weight: got {inputs.vocab_size} rows over the ranks of group, expected {vocab_size} "
            "as in weight: shard it in the same way"
        )
    with torch.no_grad():
        return rows.logps(inputs)


def _of_reference(message: str) -> str:
    """A message about the reference's head, whose arguments have other names than the policy's."""
    message = re.sub(r"\b(hidden|weight|bias)\b(?! states)", r"reference_\1", message)
    return message if message.startswith("reference_") else f"reference_hidden, reference_weight: {message}"


def empty_outputs(
    inputs: HeadInputs, needs: NeedsGrad, cu_seqlens: Tensor, reference: Tensor, *_: object
) -> tuple[Tensor, ...]:
    """The outputs of a loss's op, uninitialised: loss, log-probabilities [R], gradients."""
    loss = inputs.hidden.new_empty((), dtype=accumulator_dtype(inputs.hidden.dtype))
    return loss, loss.new_empty(reference.shape[0]), *empty_gradients(inputs, needs)
