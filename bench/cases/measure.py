"""How a case is measured: check every method against the truth, time all of them in turns, then weigh each.

Memory is measured in a fresh process for each method; its peak counts beyond the inputs. bench/README.md
states the rules in prose.
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
from ..core.operation import COMPILED, OURS, Absent, Check, Shape
from ..methods.steps import STEPS
from ..methods.table import OPERATIONS
from .case import Case, Measured, Row
from .truth import checker, make_inputs, run

# Inputs of at least this size are measured with the caches full of other data. Smaller inputs lie where the
# previous call left them.
COLD_MIB = 16
ROUNDS = (3, 20)  # at least and at most, whatever the time of a case allows


def left_out(name: str, case: Case, reason: str) -> Measured:
    """A case without figures, because none of its rows could or should be measured."""
    shape = case.shape or Shape(0, *shapes.HEADS[case.head])
    rows = dict.fromkeys((*case.ceilings, *case.methods), Row(reason))
    return Measured(name, case._replace(shape=shape), rows, [])


def measure(name: str, case: Case, device: str, seconds: float) -> Measured:
    """Check, time and weigh every method of a case.

    seconds: what the interleaved rounds may take, within ROUNDS.
    """
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
    rows, functions = _checked(case, tensors, upstream, check, device)
    del check  # frees the truth
    rows |= _timed(rows, functions, cold=_mib(tensors) >= COLD_MIB, seconds=seconds)
    token_rows = OPERATIONS[case.operation].rows
    grads_mib = _mib({name: tensors[name] for name in case.trained if name in token_rows})
    functions.clear()
    del tensors  # frees the inputs, together with the functions
    notes = [f"clocks after the rounds: {clocks()}"] if device == "cuda" else []
    if case.memory:
        try:
            rows |= _weighed(case, rows, device, grads_mib, notes)
        except PeakMemoryUnavailable as reason:
            notes.append(str(reason))
    return Measured(name, case, rows, notes)


def _checked(
    case: Case, tensors: dict[str, Tensor], upstream: Tensor | None, check: Check, device: str
) -> tuple[dict[str, Row], dict[str, Callable[[], object]]]:
    """A row for each method and ceiling, and a call of each that is right; the ceilings' calls come first."""
    rows: dict[str, Row] = {}
    right: dict[str, Callable[[], object]] = {}
    for method, load in case.methods.items():
        try:
            forward = load(device)
            results = run(forward, tensors, upstream)
        except Absent as reason:
            rows[method] = Row(f"absent: {reason}")
            continue
        except Exception as error:  # a peer that does not fit this machine or this torch may raise anything
            rows[method] = Row(f"failed: {type(error).__name__}: {_first_line(error)}")
            continue
        errors, refused = check(results)
        rows[method] = Row(refused, errors=errors, results_mib=_mib(results))
        del results
        if not refused:
            right[method] = partial(run, forward, tensors, upstream)
    ceilings = {name: make(tensors) for name, make in case.ceilings.items()}
    for name, function in ceilings.items():
        function()  # a warm-up; the check was that of the methods
        rows[name] = Row()
    return rows, {**ceilings, **right}


def _timed(
    rows: dict[str, Row], functions: dict[str, Callable[[], object]], *, cold: bool, seconds: float
) -> dict[str, Row]:
    """The rows of the functions with their times, of as many interleaved rounds as the seconds allow."""
    first = interleaved(functions, 1, warmup=0, cold=cold)
    rounds = int(min(max(seconds / sum(timing.median for timing in first.values()), ROUNDS[0]), ROUNDS[1]))
    rest = interleaved(functions, rounds - 1, warmup=0, cold=cold)
    return {
        name: rows[name]._replace(timing=Timing.of([*first[name].seconds, *timing.seconds]))
        for name, timing in rest.items()
    }


def _weighed(
    case: Case, rows: dict[str, Row], device: str, grads_mib: float, notes: list[str]
) -> dict[str, Row]:
    """The rows of the right methods with their peak memory. A method that fails is noted.

    grads_mib: size of the gradients that have a row for each token; they grow with `Case.longer`.
    """

    def weigh(method: str, case: Case = case) -> float | None:
        try:
            return _peak(case, method, device)
        except PeakMemoryUnavailable:
            raise
        except RuntimeError as error:
            notes.append(f"{method}: no peak memory: {_first_line(error)}")
            return None

    right = [method for method in case.methods if not rows[method].refused]
    # Two processes at a time on a CPU, where one's memory does not depend on the other's. On a GPU they share
    # this process's allocator.
    with ThreadPoolExecutor(2 if device == "cpu" else 1) as pool:
        peaks = zip(right, pool.map(weigh, right))
        weighed = {method: rows[method]._replace(peak_mib=peak) for method, peak in peaks}
    ours = weighed.get(OURS, rows[OURS])
    if case.longer and ours.results_mib is not None and ours.peak_mib is not None:
        longer_case = case._replace(shape=case.its_shape._replace(N=case.longer * case.its_shape.N))
        longer = weigh(OURS, longer_case)
        if longer is not None:
            held = longer - ours.results_mib - (case.longer - 1) * grads_mib
            weighed[OURS] = ours._replace(longer_mib=held)
    return weighed


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
    # The first call of torch.compile compiles, and the first call of a whole step makes its model. Neither
    # belongs to the peak, so these are warmed up at full size.
    full_size = method == COMPILED or case.operation in STEPS
    warmup = arguments if full_size else {**arguments, "shape": [min(n, 64) for n in case.its_shape]}
    return peak_memory("bench.cases.measure:prepare", arguments, warmup=warmup, device=device)


def prepare(
    operation: str, method: str, shape: list[int], dtype: str, trained: list[str], device: str
) -> Callable[[], dict[str, Tensor]]:
    """A call of a method on inputs made here, for `peak_memory` to run in a fresh process."""
    case = Case(operation, dtype, tuple(trained), {}, (), Shape(*shape))
    tensors, upstream = make_inputs(case, device)
    forward = OPERATIONS[operation].methods[method](device)
    return lambda: run(forward, tensors, upstream)


def as_json(measured: Measured) -> dict[str, Any]:
    """The case's entry in a results file."""
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
        "rows": {name: row.as_json() for name, row in measured.rows.items()},
    }
