"""Times a case in interleaved rounds, with peaks of torch's allocator in the same process."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from fastalign.measure import Timing, clocks, interleaved

from ..cases.case import Row
from ..core.operation import Absent, is_ours
from .case import Call, GpuCase


class Rounds(NamedTuple):
    """How long the rounds of a case may take in seconds, and how many there are at most.

    `GpuCase.fewest` is how many there are at least, up to `most`.
    """

    seconds: float = 1.0
    most: int = 20


class MeasuredCase(NamedTuple):
    """A case with its rows. name: the case's, or the case's and ", compiled"."""

    name: str
    case: GpuCase
    ceilings: tuple[str, ...]
    rows: dict[str, Row]
    notes: list[str]

    @property
    def failed(self) -> list[str]:
        """The names of our rows without figures."""
        return [name for name, row in self.rows.items() if is_ours(name) and row.timing is None]


def measure(case: GpuCase, device: str, rounds: Rounds, *, compiled: bool = False) -> MeasuredCase:
    """The case's rows: each call's rounds in turn with the others', and its peak.

    compiled: time `Calls.compiled` beside ours and the ceilings, in place of the peers. On a CPU the shape is
    `GpuCase.tiny` and there are no peaks.
    """
    name = f"{case.name}, compiled" if compiled else case.name
    shape = case.shape if device == "cuda" else case.tiny
    begin = time.perf_counter()
    try:
        calls = case.make(shape, device)
    except Exception as error:
        return left_out(name, case, _reason(error))
    peers = calls.compiled if compiled else calls.peers
    rows, ready = _warmed({**calls.ceilings, **calls.ours, **peers}, device)
    if not compiled:
        rows |= {row: Row(f"absent: {reason}") for row, reason in calls.absent.items()}
    warm = time.perf_counter()
    try:
        rows |= _timed(rows, ready, rounds, case)
    except Exception as error:  # each call has run before: this is the device's failure, not one call's
        rows |= {row: rows[row]._replace(refused=_reason(error)) for row in ready}
    notes = [f"first calls took {warm - begin:.1f} s, rounds {time.perf_counter() - warm:.1f} s"]
    if device == "cuda":
        notes.append(f"clocks after the rounds: {clocks()}")
    return MeasuredCase(name, case, tuple(calls.ceilings), rows, notes)


def left_out(name: str, case: GpuCase, reason: str) -> MeasuredCase:
    """The record of a case that was not measured, with the reason."""
    return MeasuredCase(name, case, (), {"fastalign": Row(reason)}, [])


def _warmed(calls: Mapping[str, Call], device: str) -> tuple[dict[str, Row], dict[str, Call]]:
    """A row for each call with its peak, and the calls that run here. The first run of a call compiles."""
    rows: dict[str, Row] = {}
    ready: dict[str, Call] = {}
    for name, call in calls.items():
        try:
            call()
            rows[name] = Row(peak_mib=_peak_mib(call) if device == "cuda" else None)
        except Exception as error:
            rows[name] = Row(_reason(error))
        else:
            ready[name] = call
    return rows, ready


def _peak_mib(call: Call) -> float:
    """Peak of torch's allocator during a call, beyond what was allocated before it."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _timed(
    rows: Mapping[str, Row], calls: Mapping[str, Call], rounds: Rounds, case: GpuCase
) -> dict[str, Row]:
    """The rows of the calls with the times of as many interleaved rounds as the seconds allow."""
    if not calls:
        return {}
    first = interleaved(calls, 1, warmup=0, queued=case.queued)
    number = rounds.seconds / sum(timing.median for timing in first.values())
    number = int(min(max(number, case.fewest), rounds.most))
    if number > 1:
        rest = interleaved(calls, number - 1, warmup=0, queued=case.queued)
        first = {name: Timing.of([*first[name].seconds, *rest[name].seconds]) for name in calls}
    return {name: rows[name]._replace(timing=timing) for name, timing in first.items()}


def _reason(error: Exception) -> str:
    """Why a row has no figures."""
    first_line = (str(error).splitlines() or [""])[0][:300]
    if isinstance(error, Absent):
        return f"absent: {first_line}"
    return f"failed: {type(error).__name__}: {first_line}"


def as_json(measured: MeasuredCase) -> dict[str, Any]:
    """The case's entry in a results file, in the form of bench.cases.measure."""
    case = measured.case
    return {
        "name": measured.name,
        "operation": case.name,
        "dtype": case.dtype,
        "shape": case.shape._asdict(),
        "ceilings": list(measured.ceilings),
        "targets": [],
        "notes": measured.notes,
        "rows": {name: row.as_json() for name, row in measured.rows.items()},
    }


def line(measured: MeasuredCase) -> str:
    """The case on one line: median ms of each row, its multiple of the first ceiling, its peak in MiB.

    Absent peers are in the results file alone.
    """
    ceiling = measured.rows[measured.ceilings[0]].timing if measured.ceilings else None

    def cell(name: str, row: Row) -> str:
        if row.timing is None:
            return f"{name}: {row.refused}"
        ratio = f" ×{row.timing.over(ceiling):.3f}" if ceiling else ""
        peak = "" if row.peak_mib is None else f" ({row.peak_mib:,.0f} MiB)"
        return f"{name} {_ms(row.timing)}{ratio}{peak}"

    return f"{measured.name}: " + " | ".join(
        cell(name, row) for name, row in measured.rows.items() if not row.refused.startswith("absent")
    )


def _ms(timing: Timing) -> str:
    return f"{1e3 * timing.median:.4g} ms"
