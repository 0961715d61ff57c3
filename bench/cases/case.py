"""What a case is: one operation at one shape and dtype, its ceilings and targets; and what is measured of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from fastalign.measure import Error, Timing

from ..core import shapes
from ..core.operation import OURS, Ceiling, Forward, Shape
from ..methods.table import OPERATIONS

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
