"""Options of the sampler, and what a test needs to run it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign_kernels import Sample, native

ROOT = Path(__file__).parents[2]


OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "tempered": {"temperature": 0.7},
    "greedy": {"temperature": 0.0},
    "top_k": {"top_k": 50},
    "top_k beyond the chunks": {"top_k": 900, "temperature": 1.3},
    "top_p": {"top_p": 0.9, "temperature": 0.7},
    "top_p small": {"top_p": 0.3},
    "top_p 0": {"top_p": 0.0},
    "top_p near 1": {"top_p": 0.999},
    "min_p": {"min_p": 0.05},
    "all": {"top_k": 100, "top_p": 0.8, "min_p": 0.02, "temperature": 0.8},
}


needs_native = pytest.mark.skipif(
    bool(native.missing), reason=f"the native library is not there: {native.missing}"
)


def mapped(drawn: Sample, function: Callable[[Tensor], Tensor]) -> Sample:
    """The tensors of a draw, changed."""
    changed: dict[str, Any] = {name: function(x) for name, x in drawn._asdict().items() if x is not None}
    return drawn._replace(**changed)


def same(ours, other, rows=slice(None)) -> None:
    """`ours` equals those rows of `other` to the bit, NaN included."""
    for name, value, theirs in zip(ours._fields[:7], ours, other):
        theirs = theirs[rows]
        if value.is_floating_point():
            value, theirs = value.view(torch.int32), theirs.view(torch.int32)
        assert torch.equal(value, theirs), name
