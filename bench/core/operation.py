"""What an operation of the suite consists of: inputs for a shape, methods, and a judge of a method's results.

A method is a loader. It imports what it needs and returns the forward function, or raises `Absent` with the
reason. A forward function takes the operation's tensors by name and returns its outputs by name. The first
output is the one that is differentiated.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign.measure import Error

Tensors = Mapping[str, Tensor]
Forward = Callable[..., dict[str, Tensor]]
Ceiling = Callable[[Tensors], Callable[[], object]]

OURS = "fastalign"
EAGER = "PyTorch"  # in fp64 it is the truth; in the case's dtype it sets the allowed error
COMPILED = "torch.compile"
EXPONENTS = "exponents"


def is_ours(row: str) -> bool:
    """Whether the row is OURS, with or without options: "fastalign, tail_eps 2**-14"."""
    return row == OURS or row.startswith(f"{OURS}, ")


class Shape(NamedTuple):
    """N tokens, hidden size H (0 for an operation on logits), vocabulary V; or N sequences of V tokens."""

    N: int
    H: int
    V: int


class Absent(Exception):
    """A method or the inputs of a case are not available here; the message is the reason."""


class Verdict(NamedTuple):
    """The largest error of each result, and why the results are wrong (empty if they are right)."""

    errors: dict[str, Error]
    refused: str


Check = Callable[[Tensors], Verdict]


class Operation(NamedTuple):
    """One operation of the suite.

    inputs: the tensors for a shape and dtype on a device. methods: loaders by name; a loader takes the
    device. rows: the inputs that have a row for each token.

    check: makes the judge of a method's results from the inputs. Needed where plain PyTorch in fp64 does not
    determine the results. Without it, results are compared with EAGER's.

    whole: makes EAGER with the logits of so many rows at a time, for an operation that mixes all rows. In
    fp64 it is the truth. It may also return EXPONENTS: intermediate numbers whose exponentials make the
    results. Rounding an exponent of size B to fp32 puts an error of B eps into every result of every method,
    and plain PyTorch's error may be smaller by luck.
    """

    inputs: Callable[[Shape, torch.dtype, str], dict[str, Tensor]]
    methods: dict[str, Callable[[str], Forward]]
    rows: tuple[str, ...]
    check: Callable[[Tensors], Check] | None = None
    whole: Callable[[int], Forward] | None = None


def module(name: str, package: str) -> Any:
    """Import the module, or raise Absent with the package to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Absent(
            f"{package} is not installed, or not importable: {str(error).splitlines()[0]}"
        ) from error


def here(forward: Forward) -> Callable[[str], Forward]:
    """A loader for a forward function that needs no imports."""
    return lambda device: forward


def compiled(forward: Forward) -> Callable[[str], Forward]:
    """A loader of torch.compile of the forward function."""

    def load(device: str) -> Forward:
        compiler = os.environ.get("CXX", "g++")
        if device == "cpu" and shutil.which(compiler) is None:
            raise Absent(f"no C++ compiler ({compiler}), which torch.compile needs on a CPU")
        torch.compiler.reset()  # torch.compile gives up at the ninth shape of one function
        return torch.compile(forward, dynamic=False, fullgraph=True)

    return load


def needs_gpu(device: str, kernels: str = "Triton") -> None:
    """Raise Absent on a CPU."""
    if device == "cpu":
        raise Absent(f"{kernels} kernels only: needs a GPU")
