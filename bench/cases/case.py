"""A case: one operation at one shape and dtype with its ceilings and targets, and what is measured of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from fastalign.measure import Error, Timing

from ..core import shapes
from ..core.operation import OURS, Ceiling, Forward, Shape
from ..methods.table import OPERATIONS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Target(NamedTuple):
    """What our row (or `row`) has to reach.

    quantity: "time" and "error" are multiples of the row `over`. "memory" is MiB beyond the results. "growth"
    is that memory at `Case.longer` times the tokens, as a multiple of the memory at the case's tokens.
    "error" leaves the loss out: a single number may be right by luck in the other row.
    """

    quantity: str
    limit: float
    over: str = ""
    row: str = OURS


class Case(NamedTuple):
    """One operation at one shape and dtype.

    trained: the inputs that get gradients. ceilings: ratios are relative to the first. memory: measure peaks
    too. shape: None takes the shape of `head`, a name in shapes.HEADS, with as many tokens as the machine
    allows. longer: with memory, measure our row's peak once more at so many times the tokens; 0: do not.
    only: the methods to measure; empty: all of the operation.
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
        """The loaders of the measured methods by name."""
        methods = OPERATIONS[self.operation].methods
        return {name: methods[name] for name in self.only or methods}

    def sized(self, device: str) -> Case:
        """This case with a shape. Raises Absent for a head that is too big or too slow for this machine."""
        if self.shape is not None:
            return self
        H, V = shapes.HEADS[self.head]
        return self._replace(shape=Shape(shapes.sized(H, V, device, shapes.memory_bytes(device)), H, V))

    @property
    def its_shape(self) -> Shape:
        """The shape of a sized case."""
        assert self.shape is not None, "a case is sized before it is measured"
        return self.shape


class Row(NamedTuple):
    """What was measured of a method or a ceiling.

    refused: why it has no figures; empty if it has. errors: the largest (absolute, relative) error of each
    result against fp64. results_mib: size of the results. peak_mib: peak memory beyond the inputs, None if
    not measured. longer_mib: memory beyond inputs and results at `Case.longer` times the tokens.
    """

    refused: str = ""
    timing: Timing | None = None
    errors: Mapping[str, Error] = {}
    results_mib: float | None = None
    peak_mib: float | None = None
    longer_mib: float | None = None

    def as_json(self) -> dict[str, Any]:
        """The row in a results file: the seconds of every round included."""
        return {
            "refused": self.refused,
            "seconds": list(self.timing.seconds) if self.timing else [],
            "errors": {key: error._asdict() for key, error in self.errors.items()},
            "results_mib": self.results_mib,
            "peak_mib": self.peak_mib,
            "longer_mib": self.longer_mib,
        }


class Measured(NamedTuple):
    """A case with its rows. conftest.py fails the run if one of our rows is refused."""

    name: str
    case: Case
    rows: dict[str, Row]
    notes: list[str]


def grid(cases: Mapping[str, Case]) -> list[tuple[str, str]]:
    """(case, row) of each test of a file of cases: ceilings first, then methods."""
    return [(name, row) for name, case in cases.items() for row in (*case.ceilings, *case.methods)]
