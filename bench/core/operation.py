"""What an operation of the suite is made of: a shape, inputs, methods, and how a method's results are judged.

A method is a loader: it imports what it needs and returns the forward function, or raises `Absent` with the
reason. A forward function takes the operation's tensors by name and returns its outputs by name; the first
one is the one that is differentiated.
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
EAGER = "PyTorch"  # defines the error that is allowed, and in fp64 the truth
COMPILED = "torch.compile"
EXPONENTS = "exponents"


def is_ours(row: str) -> bool:
    """OURS, or one of its options: "fastalign, tail_eps 2**-14"."""
    return row == OURS or row.startswith(f"{OURS}, ")


class Shape(NamedTuple):
    """N tokens, H hidden (0: an operation on logits, which does not ask), V vocabulary; or N sequences of V
    tokens."""

    N: int
    H: int
    V: int


class Absent(Exception):
    """A method, or the inputs of a case, that cannot be had here; the message is the reason."""


class Verdict(NamedTuple):
    """Largest error of each result, and why the results are wrong; empty: they are right."""

    errors: dict[str, Error]
    refused: str


Check = Callable[[Tensors], Verdict]


class Operation(NamedTuple):
    """One operation: its inputs for a shape and dtype on a device, its methods, and which inputs have a row
    for each token.

    check: from the inputs to the judge of a method's results, for an operation whose results plain PyTorch in
    fp64 does not determine; without it they are compared with EAGER's. whole: for an operation that mixes all
    rows, EAGER with the logits of so many rows at a time, which is the truth in fp64. It may return EXPONENTS
    too: numbers on the way to the results, which are made of their exponentials. Rounded in fp32, one of size
    B puts B eps into every result, whoever computes it, and plain PyTorch's own error may by luck be less.
    """

    inputs: Callable[[Shape, torch.dtype, str], dict[str, Tensor]]
    methods: dict[str, Callable[[str], Forward]]  # a loader takes the device
    rows: tuple[str, ...]
    check: Callable[[Tensors], Check] | None = None
    whole: Callable[[int], Forward] | None = None


def module(name: str, package: str) -> Any:
    """The module, or Absent with the package to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Absent(
            f"{package} is not installed, or not importable: {str(error).splitlines()[0]}"
        ) from error


def here(forward: Forward) -> Callable[[str], Forward]:
    """A loader with nothing to load."""
    return lambda device: forward


def compiled(forward: Forward) -> Callable[[str], Forward]:
    def load(device: str) -> Forward:
        compiler = os.environ.get("CXX", "g++")
        if device == "cpu" and shutil.which(compiler) is None:
            raise Absent(f"no C++ compiler ({compiler}), which torch.compile needs on a CPU")
        torch.compiler.reset()  # the ninth shape of one function would be one recompilation too many
        return torch.compile(forward, dynamic=False, fullgraph=True)

    return load


def needs_gpu(device: str, kernels: str = "Triton") -> None:
    if device == "cpu":
        raise Absent(f"{kernels} kernels only: needs a GPU")
