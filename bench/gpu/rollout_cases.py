"""A whole rollout of a small model: "All operations beside their peers" of docs/gpu.md.

shape: N rows, H unused, V new tokens a row.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from fastalign.rollout import generate

from ..core.operation import OURS, Absent, Shape
from .case import Call, Calls, GpuCase

PROMPT = 16
LAYERS = 30  # SmolLM2-135M's


def _calls(shape: Shape, device: str) -> Calls:
    try:
        from ..experiments.decode_kernels import llama
    except ImportError as error:
        raise Absent(str(error)) from error
    on_gpu = device == "cuda"
    model = llama(LAYERS if on_gpu else 1, device, torch.bfloat16 if on_gpu else torch.float32)
    generator = torch.Generator(device).manual_seed(0)
    ids = torch.randint(0, 49152, (shape.N, PROMPT), generator=generator, device=device)
    mask = torch.ones_like(ids)
    weights = torch.cat([weight.detach().flatten() for weight in model.parameters()])

    def reads() -> None:
        for _ in range(shape.V):
            weights.amax()

    rollout = partial(generate, model, ids, mask, max_new_tokens=shape.V, seed=0, eos_id=None, pad_id=0)
    options: dict[str, Any] = {"max_new_tokens": shape.V, "do_sample": True, "top_k": 0, "pad_token_id": 0}
    ours: dict[str, Call] = {OURS: rollout, f"{OURS}, eager steps": partial(rollout, cuda_graph=False)}
    compiled: dict[str, Call] = {f"{OURS}, compile=True": partial(rollout, compile=True)}
    peers: dict[str, Call] = {
        "transformers' generate": partial(model.generate, ids, attention_mask=mask, **options)
    }
    return Calls(ours, {"one read of the weights a token": reads}, peers, compiled)


CASES = (
    GpuCase(
        "rollout 135M, 64 × 128 tokens",
        Shape(64, 0, 128),
        _calls,
        tiny=Shape(2, 0, 3),
        compiles=True,
        fewest=2,
    ),
)
