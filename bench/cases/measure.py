"""How a case is measured: check every method against the truth, time all in interleaved rounds, then weigh each.

Memory is measured in a fresh process for each method; its peak counts beyond the inputs. bench/README.md states
the rules in prose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastalign.measure import PeakMemoryUnavailable, Timing, clocks, interleaved, peak_memory

from ..core import shapes
from ..core.operation import COMPILED, OURS, Absent, Shape
from ..methods.steps import STEPS
from ..methods.table import OPERATIONS
from .case import Case, Measured, Row
from .truth import checker, make_inputs, run

# From this size of inputs on, a call finds the caches full of other data. Smaller inputs lie where the previous
# call left them.
COLD_MIB = 16
ROUNDS = (3, 20)  # at least and at most, whatever the time of a case allows


def left_out(name: str, case: Case, reason: str) -> Measured:
    """A case without figures: no row of it could, or should, be measured."""
    shape = case.shape or Shape(0, *shapes.HEADS[case.head])
    return Measured(
        name, case._replace(shape=shape), dict.fromkeys((*case.ceilings, *case.methods), Row(reason)), []
    )


def measure(name: str, case: Case, device: str, seconds: float) -> Measured:
    """Check, time and weigh every method of a case; `seconds` is what its interleaved rounds may take (within
    ROUNDS)."""
    methods = case.methods
    try:
        case = case.sized(device)
        tensors, upstream = make_inputs(case, device)
    except Absent as reason:
        return left_out(name, case, f"absent: {reason}")
    try:
        check = checker(case, tensors, upstream)
    except torch.OutOfMemoryError as error:
        return left_out(
            name, case, f"absent: the truth in fp64 does not fit the memory: {_first_line(error)}"
        )
    rows: dict[str, Row] = {}
    functions: dict[str, Callable[[], object]] = {}
    for method, load in methods.items():
        try:
            forward = load(device)
            results = run(forward, tensors, upstream)
        except Absent as reason:
            rows[method] = Row(f"absent: {reason}")
            continue
        except Exception as error:  # whatever a peer that does not fit this machine or this torch raises
            rows[method] = Row(f"failed: {type(error).__name__}: {_first_line(error)}")
            continue
        errors, refused = check(results)
        rows[method] = Row(refused, None, errors, _mib(results))
        del results
        if not rows[method].refused:
            functions[method] = partial(run, forward, tensors, upstream)
    del check  # and with it the truth
    for ceiling, make in case.ceilings.items():
        functions[ceiling] = make(tensors)
        functions[ceiling]()  # methods are warm from their check
        rows[ceiling] = Row()
    functions = {**{c: functions[c] for c in case.ceilings}, **functions}
    cold = _mib(tensors) >= COLD_MIB
    first = interleaved(functions, 1, warmup=0, cold=cold)
    rounds = int(min(max(seconds / sum(timing.median for timing in first.values()), ROUNDS[0]), ROUNDS[1]))
    for row, timing in interleaved(functions, rounds - 1, warmup=0, cold=cold).items():
        rows[row] = rows[row]._replace(timing=Timing.of([*first[row].seconds, *timing.seconds]))
    per_token = _mib(
        {name: tensors[name] for name in case.trained if name in OPERATIONS[case.operation].rows}
    )  # of the results
    functions.clear()  # and with them the inputs
    del tensors
    notes = [f"clocks after the rounds: {clocks()}"] if device == "cuda" else []

    def weigh(method: str, case: Case = case) -> float | None:
        try:
            return _peak(case, method, device)
        except PeakMemoryUnavailable:
            raise
        except RuntimeError as error:
            notes.append(f"{method}: no peak memory: {_first_line(error)}")
            return None

    if case.memory:
        fine = [method for method in methods if not rows[method].refused]
        try:
            # Two processes at a time on a CPU: what one holds does not depend on the other. On a GPU they are
            # no processes of their own.
            with ThreadPoolExecutor(2 if device == "cpu" else 1) as pool:
                for method, peak in zip(fine, pool.map(weigh, fine)):
                    rows[method] = rows[method]._replace(peak_mib=peak)
            ours = rows[OURS]
            if case.longer and ours.results_mib is not None and ours.peak_mib is not None:
                longer = weigh(
                    OURS, case._replace(shape=case.its_shape._replace(N=case.longer * case.its_shape.N))
                )
                if longer is not None:
                    rows[OURS] = ours._replace(
                        longer_mib=longer - ours.results_mib - (case.longer - 1) * per_token
                    )
        except PeakMemoryUnavailable as reason:
            notes.append(str(reason))
    return Measured(name, case, rows, notes)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _mib(results: Mapping[str, Tensor]) -> float:
    return sum(t.numel() * t.element_size() for t in results.values()) / 2**20


def _peak(case: Case, method: str, device: str) -> float:
    arguments = {
        "operation": case.operation,
        "method": method,
        "shape": case.its_shape,
        "dtype": case.dtype,
        "trained": case.trained,
        "device": device,
    }
    # torch.compile compiles at its first call for a shape, and a whole step makes its model: neither is part
    # of what a step holds.
    whole = method == COMPILED or case.operation in STEPS
    warmup = arguments if whole else {**arguments, "shape": [min(n, 64) for n in case.its_shape]}
    return peak_memory("bench.cases.measure:prepare", arguments, warmup=warmup, device=device)


def prepare(
    operation: str, method: str, shape: list[int], dtype: str, trained: list[str], device: str
) -> Callable[[], dict[str, Tensor]]:
    """A method's call on inputs made here: what `peak_memory` runs in a process of its own."""
    case = Case(operation, dtype, tuple(trained), {}, (), Shape(*shape))
    tensors, upstream = make_inputs(case, device)
    forward = OPERATIONS[operation].methods[method](device)
    return lambda: run(forward, tensors, upstream)


def as_json(measured: Measured) -> dict[str, Any]:
    """What report.py reads: every second of every round included."""
    case = measured.case
    return {
        "name": measured.name,
        "operation": case.operation,
        "dtype": case.dtype,
        "trained": list(case.trained),
        "shape": case.its_shape._asdict(),
        "longer": case.longer,
        "ceilings": list(case.ceilings),
        "targets": [target._asdict() for target in case.targets],
        "notes": measured.notes,
        "rows": {
            name: {
                "refused": row.refused,
                "seconds": list(row.timing.seconds) if row.timing else [],
                "errors": {key: error._asdict() for key, error in row.errors.items()},
                "results_mib": row.results_mib,
                "peak_mib": row.peak_mib,
                "longer_mib": row.longer_mib,
            }
            for name, row in measured.rows.items()
        },
    }
