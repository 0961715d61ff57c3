"""An operation of the suite as a case of the GPU times: our rows, the ceilings, and the peers found here."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from ..cases import case as suite_case
from ..cases.truth import make_inputs, run
from ..core.operation import COMPILED, Absent, Ceiling, Shape, is_ours
from ..methods.policy import LIGER_GRPO
from ..methods.preference import LIGER_DPO, LIGER_KTO
from .case import TINY, Call, Calls, GpuCase

# These compile, or try launch parameters, for half a minute at their first call.
COMPILE = (COMPILED, LIGER_DPO, LIGER_KTO, LIGER_GRPO, "Apple CCE")


def operation_case(
    name: str,
    operation: str,
    shape: Shape,
    *,
    dtype: str = "bf16",
    trained: tuple[str, ...],
    ceilings: Mapping[str, Ceiling],
    only: tuple[str, ...] = (),
    tiny: Shape = TINY,
    compiles: bool = False,
) -> GpuCase:
    """A case of an operation in bench.methods.table. Arguments: see bench.cases.case.Case.

    Its results are not compared with fp64 here: `--part tests` does that.
    """

    def make(shape: Shape, device: str) -> Calls:
        case = suite_case.Case(operation, dtype, trained, ceilings, (), shape, only=only)
        tensors, upstream = make_inputs(case, device)
        ours: dict[str, Call] = {}
        peers: dict[str, Call] = {}
        compiled: dict[str, Call] = {}
        absent: dict[str, str] = {}
        for row, load in case.methods.items():
            try:
                call = partial(run, load(device), tensors, upstream)
            except Absent as reason:
                absent[row] = str(reason)
                continue
            compiles = row.startswith(COMPILE)
            (ours if is_ours(row) else compiled if compiles else peers)[row] = call
        return Calls(ours, {row: make(tensors) for row, make in ceilings.items()}, peers, compiled, absent)

    return GpuCase(name, shape, make, dtype, tiny, compiles)
