"""Draws on small rows by every path of the native sampler, and compares the tokens with the CPU's.

`python -m bench.gpu.draw cuda` is what compute-sanitizer runs in a GPU check.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

import fastalign

V = 5003
FILTERS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.0},
    {"top_k": 50},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"top_k": 400, "top_p": 0.8, "temperature": 0.7},
)


def draw(device: str) -> None:
    """The paths: dtypes, filters, masks, and a row without a finite logit.

    Raises:
        AssertionError: a token differs from the CPU's.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, V, generator=generator) * 4
    logits[4] = float("nan")
    words = torch.randint(-(2**31), 2**31, (5, -(-V // 32)), generator=generator, dtype=torch.int64)
    masks = words.to(torch.int32)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for options in FILTERS:
            for seen in (None, masks):
                on_cpu, on_device = (
                    fastalign.sample(
                        logits.to(where, dtype),
                        seed=1,
                        seen=None if seen is None else seen.to(where),
                        repetition_penalty=1.0 if seen is None else 1.3,
                        **options,
                    )
                    for where in ("cpu", device)
                )
                same = torch.equal(on_cpu.token, on_device.token.cpu()) and not on_device.valid[4]
                assert same, (dtype, options)


if __name__ == "__main__":
    draw(sys.argv[1])
