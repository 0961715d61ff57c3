"""A token from each row of logits, with a cold L2 cache: "Sampling" of docs/gpu.md."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastalign

from ..core.operation import OURS, Absent, Shape
from ..methods.ceilings import one_read
from ..methods.sampling import TRANSFORMERS, Filter, flashinfer, trained_inputs, warpers
from .case import Call, Calls, GpuCase
from .suite import operation_case

FILTERS: dict[str, dict[str, Any]] = {
    "no filter": {},
    "T 0.7": {"temperature": 0.7},
    "top_k 50": {"top_k": 50},
    "top_p 0.9": {"top_p": 0.9},
    "min_p 0.05": {"min_p": 0.05},
}
PEERS = {"no filter": Filter(), "top_k 50": Filter(top_k=50), "top_p 0.9": Filter(top_p=0.9)}
READ = {"one read (amax)": one_read}
TINY = Shape(2, 0, 64)
MOST, FEWEST = Shape(512, 0, 151936), Shape(1, 0, 151936)
QWEN, LLAMA = Shape(64, 0, 151936), Shape(256, 0, 128256)


def normal_inputs(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Normal logits with standard deviation 3."""
    generator = torch.Generator(device).manual_seed(0)
    return {"logits": torch.randn(shape.N, shape.V, generator=generator, device=device).mul_(3).to(dtype)}


def _case(
    name: str,
    shape: Shape,
    inputs: Callable[[Shape, torch.dtype, str], dict[str, Tensor]],
    dtype: torch.dtype = torch.float32,
) -> GpuCase:
    """All filters of ours and of the peers on the same logits."""

    def make(shape: Shape, device: str) -> Calls:
        tensors = inputs(shape, dtype, device)
        logits = tensors["logits"]
        ours = {
            f"{OURS}, {rule}": partial(fastalign.sample, logits, seed=0, **options)
            for rule, options in FILTERS.items()
        }
        peers: dict[str, Call] = {}
        absent: dict[str, str] = {}
        for rule, options in PEERS.items():
            for peer, load in ((TRANSFORMERS, warpers(options)), ("FlashInfer", flashinfer(options))):
                try:
                    peers[f"{peer}, {rule}"] = partial(load(device), logits)
                except Absent as reason:
                    absent[f"{peer}, {rule}"] = str(reason)
        return Calls(ours, {"one read (amax)": one_read(tensors)}, peers, absent=absent)

    return GpuCase(
        f"sample {name}", shape, make, "bf16" if dtype == torch.bfloat16 else "fp32", TINY, queued=True
    )


CASES = (
    _case("[64, 151936] normal", QWEN, normal_inputs),
    _case("[64, 151936] Zipf", QWEN, trained_inputs),
    _case("[1, 151936]", FEWEST, trained_inputs),
    _case("[256, 128256]", LLAMA, normal_inputs),
    _case("[512, 151936] Zipf", MOST, trained_inputs),
    _case("bf16 [64, 151936]", QWEN, normal_inputs, torch.bfloat16),
    *(
        operation_case(
            name.replace("sample", "sample fp32", 1),
            name,
            QWEN,
            dtype="fp32",
            trained=(),
            ceilings=READ,
            tiny=TINY,
        )
        for name in ("sample, top_p 0.9 at T 0.7", "sample, top_p 0.9 at T 0.7, trained-like logits")
    ),
)
