"""A case of the GPU times: one of our calls beside its ceiling and its peers, all on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from ..core.operation import Shape

Call = Callable[[], object]
TINY = Shape(8, 16, 64)


class Calls(NamedTuple):
    """The calls of a case, by the names of their rows. They share inputs that lie on the device.

    ours: "fastalign", or "fastalign, OPTION". ceilings: ratios are relative to the first. compiled: calls
    that compile for seconds at their first run, so they are timed after all other cases. absent: rows that
    cannot run here, with the reason.
    """

    ours: Mapping[str, Call]
    ceilings: Mapping[str, Call]
    peers: Mapping[str, Call] = {}
    compiled: Mapping[str, Call] = {}
    absent: Mapping[str, str] = {}


class GpuCase(NamedTuple):
    """What is timed in turns.

    make(shape, device) allocates the inputs on the device and returns the calls. shape: N, H (0 for an
    operation on logits), V. tiny: the shape of a dry run on a CPU. compiles: `Calls.compiled` is worth half a
    minute here. queued: time the device alone, not the host's launches (fastalign.measure.interleaved).
    fewest: rounds at least.
    """

    name: str
    shape: Shape
    make: Callable[[Shape, str], Calls]
    dtype: str = "bf16"
    tiny: Shape = TINY
    compiles: bool = False
    queued: bool = False
    fewest: int = 5
