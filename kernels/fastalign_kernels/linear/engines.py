"""Which engine serves a head call. The losses call these functions and no engine by name."""

from __future__ import annotations

import torch
from torch import Tensor

from .engine import Engine, Gradients, SequenceCoefficients, Sequences, TokenCoefficients, empty_gradients
from .inputs import HeadInputs, NeedsGrad
from .token_tiles import TOKEN_TILES


def engine_for(inputs: HeadInputs, needs: NeedsGrad) -> Engine:
    """The engine of a call."""
    return TOKEN_TILES


def _no_autocast(inputs: HeadInputs) -> torch.autocast:
    """Engines choose dtypes themselves; autocast would cast the factors of some GEMMs again."""
    return torch.autocast(inputs.hidden.device.type, enabled=False)


def statistics(inputs: HeadInputs, needs: NeedsGrad) -> tuple[Tensor, list[Tensor]]:
    """`Engine.statistics`."""
    with _no_autocast(inputs):
        return engine_for(inputs, needs).statistics(inputs, needs)


def gradients(
    inputs: HeadInputs, stats: Tensor, saved: list[Tensor], coefficients: Tensor, needs: NeedsGrad
) -> Gradients:
    """`Engine.gradients`."""
    with _no_autocast(inputs):
        return engine_for(inputs, needs).gradients(inputs, stats, saved, coefficients, needs)


def statistics_and_gradients(
    inputs: HeadInputs, token_coefficients: TokenCoefficients, needs: NeedsGrad
) -> tuple[Tensor, Gradients]:
    """`Engine.statistics_and_gradients`; without a gradient to compute, the statistics alone."""
    if not any(needs):
        return statistics(inputs, needs)[0], empty_gradients(inputs, needs)
    with _no_autocast(inputs):
        return engine_for(inputs, needs).statistics_and_gradients(inputs, token_coefficients, needs)


def of_sequences(
    inputs: HeadInputs, coefficients: SequenceCoefficients, sequences: Sequences, needs: NeedsGrad
) -> tuple[Tensor, Gradients]:
    """`Engine.of_sequences`."""
    with _no_autocast(inputs):
        return engine_for(inputs, needs).of_sequences(inputs, coefficients, sequences, needs)
