"""Which engine serves a head call. The losses call these functions and no engine by name."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from .. import native
from ..device import architecture
from ..dispatch import warn_once
from ..torch_func import assumed_constant
from .engine import Engine, Gradients, SequenceCoefficients, Sequences, TokenCoefficients, empty_gradients
from .gpu.epilogue import EpilogueStatistics
from .gpu.epilogue_slices import EpilogueSlices
from .gpu.plan import gpu_saved_mib, gpu_workspace_mib, select_engine
from .gpu.screen import ScreenedEpilogue
from .gpu.tail import TailEpilogue
from .inputs import HeadInputs, NeedsGrad
from .screen import COUNTER, ScreenCounts
from .sharded_engine import ShardedEngine, local_inputs
from .token_tiles import TOKEN_TILES

_NOTHING = nullcontext()
# Engines whose `gradients` overwrites what `statistics` saved.
OVERWRITING = ("kept_softmax", "epilogue", "tail", "screen")
UNTRIED = "screen: this engine has not run on a GPU yet (docs/screen.md); compare some steps with screen=None"


class Selection(NamedTuple):
    """The engine of a call, and the memory that it has if the call does not say."""

    name: str
    workspace_mib: float
    saved_mib: float = 0.0  # for what is kept between the passes, if all of it fits


@assumed_constant
@functools.cache
def _card_bytes(index: int | None) -> int:
    """The memory of a CUDA device."""
    return torch.cuda.get_device_properties(index).total_memory


def _runs_in_chunks(inputs: HeadInputs) -> bool:
    """Whether token tiles serve a call.

    They exchange the statistics of a sharded weight themselves, so no rank may decide this by its own number
    of rows.
    """
    sharded_tail = inputs.options.shards is not None and inputs.options.tail_eps is not None
    return not inputs.hidden.is_cuda or bool(native.triton_missing) or sharded_tail


def select(inputs: HeadInputs, needs: NeedsGrad) -> Selection:
    """The engine of a call, by name; of a sharded weight that of this rank's rows."""
    if _runs_in_chunks(inputs) or inputs.weight.shape[0] == 0:
        return Selection("token_tiles", 0.0)
    if inputs.options.shards is not None:
        inputs = local_inputs(inputs)
    index = inputs.hidden.device.index
    card_bytes = _card_bytes(index)
    workspace_mib = gpu_workspace_mib(card_bytes)
    name = select_engine(inputs.gpu_call(needs, workspace_mib, architecture=architecture(index)))
    return Selection(name, workspace_mib, gpu_saved_mib(card_bytes))


def engine_for(inputs: HeadInputs, needs: NeedsGrad) -> Engine:
    """The engine of a call."""
    if inputs.options.shards is not None and not _runs_in_chunks(inputs):
        return ShardedEngine(_engine(select(inputs, needs)))
    return _engine(select(inputs, needs))


def _forward_engine(inputs: HeadInputs, needs: NeedsGrad) -> Engine:
    """`engine_for` a call that computes statistics. Tokens of a screen that runs exact here are counted."""
    engine = engine_for(inputs, needs)
    if inputs.options.screen and inputs.hidden.is_cuda and not isinstance(engine, ScreenedEpilogue):
        tokens = inputs.hidden.shape[0]
        COUNTER.add(ScreenCounts(tokens, tokens))
    return engine


def _engine(selection: Selection) -> Engine:
    name, workspace_mib, saved_mib = selection
    if name == "token_tiles":
        return TOKEN_TILES
    if name == "epilogue":
        return EpilogueStatistics(workspace_mib, saved_mib=saved_mib)
    if name == "epilogue_slices":
        return EpilogueSlices(workspace_mib)
    if name == "tail":
        return TailEpilogue(workspace_mib, saved_mib=saved_mib)
    if name == "screen":
        if not torch.compiler.is_compiling():
            warn_once(UNTRIED)
        return ScreenedEpilogue(workspace_mib, saved_mib=saved_mib)
    # here, because triton is absent on macOS and Windows
    from .gpu.kept_softmax import KeptSoftmax
    from .gpu.vocab_slices import VocabSlices

    return KeptSoftmax(workspace_mib, saved_mib) if name == "kept_softmax" else VocabSlices(workspace_mib)


def overwrites_saved(inputs: HeadInputs, needs: NeedsGrad) -> bool:
    """Whether the gradients can be computed only once from what is saved."""
    return select(inputs, needs).name in OVERWRITING


def engine_context(inputs: HeadInputs) -> AbstractContextManager[object]:
    """A context without autocast and on the tensors' GPU.

    Autocast would cast the factors of some GEMMs again, and Triton launches on the current GPU. Nothing is
    entered if both hold already: entering costs microseconds.
    """
    device = inputs.hidden.device
    autocast = torch.is_autocast_enabled(device.type)
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    if not autocast and not elsewhere:
        return _NOTHING
    stack = ExitStack()
    if autocast:
        stack.enter_context(torch.autocast(device.type, enabled=False))
    if elsewhere:
        stack.enter_context(torch.cuda.device(device))
    return stack


def statistics(inputs: HeadInputs, needs: NeedsGrad) -> tuple[Tensor, list[Tensor]]:
    """Statistics by the call's engine: `Engine.statistics`."""
    with engine_context(inputs):
        return _forward_engine(inputs, needs).statistics(inputs, needs)


def gradients(
    inputs: HeadInputs, stats: Tensor, saved: list[Tensor], coefficients: Tensor, needs: NeedsGrad
) -> Gradients:
    """Gradients by the call's engine: `Engine.gradients`."""
    with engine_context(inputs):
        return engine_for(inputs, needs).gradients(inputs, stats, saved, coefficients, needs)


def statistics_and_gradients(
    inputs: HeadInputs, token_coefficients: TokenCoefficients, needs: NeedsGrad
) -> tuple[Tensor, Gradients]:
    """`Engine.statistics_and_gradients`; without a gradient to compute, the statistics alone."""
    if not any(needs):
        return statistics(inputs, needs)[0], empty_gradients(inputs, needs)
    with engine_context(inputs):
        return _forward_engine(inputs, needs).statistics_and_gradients(inputs, token_coefficients, needs)


def of_sequences(
    inputs: HeadInputs, coefficients: SequenceCoefficients, sequences: Sequences, needs: NeedsGrad
) -> tuple[Tensor, Gradients]:
    """Statistics and gradients by the call's engine: `Engine.of_sequences`."""
    with engine_context(inputs):
        return _forward_engine(inputs, needs).of_sequences(inputs, coefficients, sequences, needs)
