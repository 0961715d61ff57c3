"""What a head call needs of the machine, in two functions: statistics of the tokens, and gradients.

An engine decides how the loop runs and what it saves; no loss knows which engine runs. Token tiles serve
CPUs. To add an engine, write its class in a file of its own and name it in engines.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..softmax.rows import Stat, accumulator_dtype
from .inputs import HeadInputs, NeedsGrad

# Statistics [7, C] of some tokens, and their indices -> the gradient kernel's coefficients [4, C].
TokenCoefficients = Callable[[Tensor, Tensor | slice], Tensor]
# The whole table [7, N], in which the sequences of these tokens are complete, and their indices -> [4, C].
SequenceCoefficients = Callable[[Tensor, Tensor | slice], Tensor]


class Gradients(NamedTuple):
    """The gradients of a head call, in the dtypes of its inputs; of size 0 where not needed.

    The fields are those of NeedsGrad.
    """

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor  # [V]
    lora_hidden: Tensor  # [N, r]
    lora_weight: Tensor  # [V, r]


class Sequences(NamedTuple):
    """Packed rows, and which of them a loss takes together: a pair for DPO, one row for KTO."""

    cu_seqlens: Tensor  # [R + 1]
    groups: list[tuple[int, ...]]  # row numbers


class Engine(ABC):
    """How a head's loop runs on one kind of machine.

    hidden_done: called with dX [N, H] when all of it is queued, if the gradient of the weight is not yet: a
    sum over ranks then runs beside its GEMM. An engine that makes dX last does not call it.
    """

    hidden_done: Callable[[Tensor], None] | None = None

    def saves(self, inputs: HeadInputs, needs: NeedsGrad) -> bool:
        """Whether `statistics` saves something."""
        return any(needs)

    @abstractmethod
    def statistics(self, inputs: HeadInputs, needs: NeedsGrad) -> tuple[Tensor, list[Tensor]]:
        """The statistics [7, N] of the tokens, and what `gradients` will use again."""

    @abstractmethod
    def empty_saved(self, inputs: HeadInputs, needs: NeedsGrad) -> list[Tensor]:
        """What `statistics` saves, uninitialised: its sizes are known beforehand, as a compiler needs."""

    @abstractmethod
    def gradients(
        self,
        inputs: HeadInputs,
        stats: Tensor,
        saved: list[Tensor],
        coefficients: Tensor,
        needs: NeedsGrad,
    ) -> Gradients:
        """Gradients for the coefficients [4, N] of the gradient kernel (softmax/rows.py)."""

    def statistics_and_gradients(
        self, inputs: HeadInputs, token_coefficients: TokenCoefficients, needs: NeedsGrad
    ) -> tuple[Tensor, Gradients]:
        """Statistics and gradients of a loss whose coefficients follow from a token's own statistics."""
        return self.of_sequences(inputs, token_coefficients, None, needs)

    def of_sequences(
        self,
        inputs: HeadInputs,
        coefficients: SequenceCoefficients,
        sequences: Sequences | None,
        needs: NeedsGrad,
    ) -> tuple[Tensor, Gradients]:
        """Statistics and gradients of a loss whose coefficients follow from a token's whole `sequences`."""
        stats, saved = self.statistics(inputs, needs)
        return stats, self.gradients(inputs, stats, saved, coefficients(stats, slice(None)), needs)


def of_table(coefficients: Tensor) -> TokenCoefficients:
    """A function that reads some tokens' columns of given coefficients [4, N]."""
    return lambda _, tokens: coefficients[:, tokens]


def empty_stats(inputs: HeadInputs, *_: object) -> Tensor:
    """The table [7, N], uninitialised."""
    hidden = inputs.hidden
    return hidden.new_empty(len(Stat), hidden.shape[0], dtype=accumulator_dtype(hidden.dtype))


def hidden_grad_dtype(inputs: HeadInputs) -> torch.dtype:
    """The dtype of dX."""
    dtype = inputs.hidden.dtype
    return accumulator_dtype(dtype) if inputs.options.wide else dtype


def empty_gradients(inputs: HeadInputs, needs: NeedsGrad) -> Gradients:
    """Gradients, uninitialised."""
    hidden, bias = inputs.hidden, inputs.bias

    def empty_like(x: Tensor | None, need: bool, dtype: torch.dtype | None = None) -> Tensor:
        if x is None or not need:
            return (hidden if x is None else x).new_empty(0)
        return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)

    return Gradients(
        empty_like(hidden, needs.hidden, hidden_grad_dtype(inputs)),
        empty_like(inputs.weight, needs.weight),
        bias.new_empty(bias.shape) if needs.bias and bias is not None else hidden.new_empty(0),
        empty_like(inputs.lora_hidden, needs.lora_hidden),
        empty_like(inputs.lora_weight, needs.lora_weight),
    )
