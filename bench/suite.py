"""How a case is measured: the truth in fp64 first, each method checked against it, then time in interleaved
rounds, then memory.

Memory is measured in a fresh process a method; its peak counts beyond the inputs. README.md in this folder
states the rules in prose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign.measure import (
    Error,
    PeakMemoryUnavailable,
    Timing,
    clocks,
    interleaved,
    largest_error,
    peak_memory,
)

from . import shapes
from .methods import OPERATIONS
from .operation import (
    COMPILED,
    EAGER,
    EXPONENTS,
    OURS,
    Absent,
    Ceiling,
    Check,
    Forward,
    Shape,
    Tensors,
    Verdict,
)
from .step_methods import STEPS

ROWS_AT_ONCE = 256  # of the truth in fp64
# inputs from which on a call finds the caches full of other data; smaller ones lie where the call before left
# them
COLD_MIB = 16
ROUNDS = (3, 20)  # at least and at most, whatever the time of a case allows
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Target(NamedTuple):
    """What our row (or `row`) has to reach: "time" or "error" as a multiple of another row's, or "memory"
    beyond its results in MiB.

    "growth" is that memory at `Case.longer` times the tokens as a multiple of what it is at the case's own.
    "error" leaves the loss out, a single number that the other row may have right by luck.
    """

    quantity: str
    limit: float
    over: str = ""
    row: str = OURS


class Case(NamedTuple):
    """One operation at one shape and dtype: which inputs are trained, the ceilings (ratios are to the first),
    and the targets.

    shape: None is that of `head`, a name in shapes.HEADS, with as many tokens as the machine can do.
    longer: with memory, our row's is measured once more at so many times the tokens; 0: it is not.
    only: the methods that are measured; empty: all that the operation has.
    """

    operation: str
    dtype: str
    trained: tuple[str, ...]
    ceilings: Mapping[str, Ceiling]
    targets: tuple[Target, ...]
    shape: Shape | None = None
    memory: bool = False
    longer: int = 0
    head: str = shapes.HEAD
    only: tuple[str, ...] = ()

    @property
    def methods(self) -> dict[str, Callable[[str], Forward]]:
        """The operation's, or those of `only`."""
        methods = OPERATIONS[self.operation].methods
        return {name: methods[name] for name in self.only or methods}

    def sized(self, device: str) -> Case:
        """With a shape. Raises Absent for a head that is too big for this machine."""
        if self.shape is not None:
            return self
        H, V = shapes.HEADS[self.head]
        return self._replace(shape=Shape(shapes.sized(H, V, device, shapes.memory_bytes(device)), H, V))

    @property
    def its_shape(self) -> Shape:
        """The shape of a case that was sized."""
        assert self.shape is not None, "a case is sized before it is measured"
        return self.shape


class Row(NamedTuple):
    """What was found for a method or a ceiling. `refused` is the reason why it has no figures; empty: it has.

    errors: largest (absolute, relative) error of each result against fp64. results_mib: bytes of the results.
    peak_mib: peak memory beyond the inputs, None where it was not measured. longer_mib: that beyond inputs
    and results at `Case.longer` times the tokens.
    """

    refused: str = ""
    timing: Timing | None = None
    errors: Mapping[str, Error] = {}
    results_mib: float | None = None
    peak_mib: float | None = None
    longer_mib: float | None = None


class Measured(NamedTuple):
    """A case with its rows; our own row is never silently refused (see conftest.py)."""

    name: str
    case: Case
    rows: dict[str, Row]
    notes: list[str]


def grid(cases: Mapping[str, Case]) -> list[tuple[str, str]]:
    """(case, row) of every test of a bench file: ceilings first, then methods."""
    return [(name, row) for name, case in cases.items() for row in (*case.ceilings, *case.methods)]


def make_inputs(case: Case, device: str) -> tuple[dict[str, Tensor], Tensor | None]:
    """The tensors of a case, and the gradient that arrives at the first output: 1 for a loss, for log-probs
    one of mixed sign a token."""
    tensors = OPERATIONS[case.operation].inputs(case.its_shape, DTYPES[case.dtype], device)
    for name in case.trained:
        tensors[name].requires_grad_()
    if not case.trained:
        return tensors, None
    if "logprobs" not in case.operation:
        return tensors, torch.ones((), device=device)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(case.its_shape.N, generator=generator).to(
        DTYPES[case.dtype]
    )  # rounded, so that every method is given the same
    return tensors, upstream.to(device)


def run(forward: Forward, tensors: Mapping[str, Tensor], upstream: Tensor | None) -> dict[str, Tensor]:
    """Outputs by name and, with an upstream gradient of the first, the gradient of each trained tensor as "d
    name"."""
    if upstream is None:
        with torch.no_grad():
            return forward(**tensors)
    outputs = forward(**tensors)
    first = next(iter(outputs.values()))
    trained = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    gradients = torch.autograd.grad(first, list(trained.values()), upstream.to(first.dtype))
    return {
        **{name: output.detach() for name, output in outputs.items()},
        **{f"d {name}": g for name, g in zip(trained, gradients)},
    }


def truth(case: Case, tensors: Mapping[str, Tensor], upstream: Tensor | None) -> dict[str, Tensor]:
    """Plain PyTorch in fp64, some rows at a time: token results are put end to end, sums over tokens are
    added up."""
    operation = OPERATIONS[case.operation]
    if operation.whole:
        return run(
            operation.whole(ROWS_AT_ONCE),
            {name: _widened(tensor) for name, tensor in tensors.items()},
            upstream,
        )
    forward = operation.methods[EAGER](next(iter(tensors.values())).device.type)
    shared = {name: _widened(tensor) for name, tensor in tensors.items() if name not in operation.rows}
    parts: dict[str, list[Tensor]] = {}
    for begin in range(0, case.its_shape.N, ROWS_AT_ONCE):
        rows = slice(begin, begin + ROWS_AT_ONCE)
        chunk = {
            name: shared[name] if name in shared else _widened(tensor[rows])
            for name, tensor in tensors.items()
        }
        share = min(ROWS_AT_ONCE, case.its_shape.N - begin) / case.its_shape.N  # of a mean over all tokens
        incoming = (
            None if upstream is None else upstream[rows] if upstream.dim() else upstream.double() * share
        )
        for name, result in run(forward, chunk, incoming).items():
            if result.dim() == 0:
                result = result * share
            if name in parts and (result.dim() == 0 or name.removeprefix("d ") in shared):
                parts[name][0] += result
            else:
                parts.setdefault(name, []).append(result)
    return {name: torch.cat(part) if len(part) > 1 else part[0] for name, part in parts.items()}


def _widened(tensor: Tensor) -> Tensor:
    return (
        tensor.detach().double().requires_grad_(tensor.requires_grad)
        if tensor.is_floating_point()
        else tensor
    )


def judge(
    results: Mapping[str, Tensor],
    errors: Mapping[str, Error],
    eager: Mapping[str, Error],
    scales: Mapping[str, float],
) -> str:
    """Why these results are wrong, or "" when each is within twice PyTorch's own error of the truth, plus a
    floor.

    The floor is 4 eps of fp32 times the largest |truth|, what fp32 sums can cost anyone; for a single number,
    where PyTorch may be right by luck, at least one rounding to the dtype that the result is in.
    """
    for name, error in errors.items():
        eps = 4 * torch.finfo(torch.float32).eps
        if results[name].numel() == 1 and results[name].is_floating_point():
            eps = max(eps, torch.finfo(results[name].dtype).eps)
        limit = 2 * eager[name].absolute + eps * scales[name]
        if not error.absolute <= limit:  # NaN is wrong too
            return f"wrong: {name} is off by {error.absolute:.2e}; PyTorch by {eager[name].absolute:.2e}, {limit:.2e} allowed"
    return ""


def checker(case: Case, tensors: dict[str, Tensor], upstream: Tensor | None) -> Check:
    """The operation's own judge of results, else plain PyTorch's truth and error."""
    operation = OPERATIONS[case.operation]
    if operation.check:
        return operation.check(tensors)
    true = truth(case, tensors, upstream)
    scales = {key: value.double().abs().amax().item() for key, value in true.items()}
    exponent = scales.get(EXPONENTS, 0.0)
    scales = {key: scale * (1 + exponent) for key, scale in scales.items()}
    eager = largest_error(
        run(operation.methods[EAGER](next(iter(tensors.values())).device.type), tensors, upstream), true
    )

    def check(results: Tensors) -> Verdict:
        errors = largest_error(results, true)
        return Verdict(errors, judge(results, errors, eager, scales))

    return check


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
    return peak_memory("bench.suite:prepare", arguments, warmup=warmup, device=device)


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
