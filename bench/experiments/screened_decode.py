"""A rollout's draw with a screen beside exact logits: `python -m bench.experiments.screened_decode`.

A step draws one token of each of B rows from hidden states. Each round runs three methods in turn: exact
logits by torch's linear, as `rollout.generate` does, exact logits by the GEMM of the linear_* functions, and
screened ones. All end with `sample`. The table has medians of CPU milliseconds, or of elapsed ones with more
than one thread.

Heads: SmolLM2-135M's with hidden states of English text, and one of Qwen2.5-0.5B's shape that is made: unit
rows, other columns' logits of standard deviation 2, and ten likely ids of 18, 17, ... above them. Tokens of
all rounds are compared with those of exact fp32 products.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastalign_kernels import sample, screen_counts
from fastalign_kernels.gemm import mm
from fastalign_kernels.linear.screen_draws import ScreenedDraws
from fastalign_kernels.linear.screen_weight import code_weight

from ..core.operation import Shape
from ..core.smollm2 import head_inputs

FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "greedy": {"temperature": 0.0},
    "top-k 50": {"top_k": 50},
    "min-p 0.05": {"min_p": 0.05},
    "top-p 0.9": {"top_p": 0.9},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def smollm2(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    given = head_inputs(Shape(2048, 576, 49152), torch.float32, "cpu")
    picked = torch.randperm(2048, generator=torch.Generator().manual_seed(0))[:rows]
    return given["hidden"][picked].to(dtype), given["weight"].to(dtype)


def made(rows: int, dtype: torch.dtype, V: int = 151936, H: int = 896) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = F.normalize(torch.randn(V, H, generator=generator))
    hidden = 2.0 * torch.randn(rows, H, generator=generator)
    likely = torch.randint(0, V, (10, rows), generator=generator)
    for rank, ids in enumerate(likely):
        hidden += (18.0 - rank) * weight[ids]
    return hidden.to(dtype), weight.to(dtype)


HEADS = {"SmolLM2-135M": smollm2, "made 151936 x 896": made}


def draws(hidden: Tensor, weight: Tensor, head: ScreenedDraws) -> dict[str, Callable[..., Tensor]]:
    """Logits for `sample`, by name."""
    logits = torch.empty(hidden.shape[0], weight.shape[0])

    def native(**_: Any) -> Tensor:
        mm(hidden, weight.t(), logits)
        return logits

    return {
        "torch": lambda **_: F.linear(hidden, weight),
        "native": native,
        "screen": lambda **options: head.logits(hidden, weight, **options),
    }


def measured(
    hidden: Tensor, weight: Tensor, options: dict[str, Any], *, rounds: int, clock: Callable[[], float]
) -> str:
    """The numbers of a table's row."""
    times = defaultdict(list)
    screened_differ = 0
    head = ScreenedDraws(1.0, None)
    methods = draws(hidden, weight, head)
    expected = hidden.float() @ weight.float().t()
    for logits in methods.values():
        logits(seed=0, **options)
    screen_counts()
    for seed in range(rounds):
        for name, logits in methods.items():
            start = clock()
            drawn = sample(logits(seed=seed, **options), seed=seed, **options)
            times[name].append(1e3 * (clock() - start))
        screened_differ += int((drawn.token != sample(expected, seed=seed, **options).token).sum())
    counts = screen_counts()
    torch_ms, native_ms, screen_ms = (
        statistics.median(times[name]) for name in ("torch", "native", "screen")
    )
    columns = counts.exact_columns / max(1, counts.tokens - counts.exact_tokens)
    return " | ".join(
        [
            *(f"{ms:.1f}" for ms in (torch_ms, native_ms, screen_ms)),
            f"{screen_ms / torch_ms:.2f}",
            f"{screen_ms / native_ms:.2f}",
            f"{columns:.0f}",
            f"{counts.exact_tokens / counts.tokens:.3f}",
            f"{counts.open_tokens / counts.tokens:.3f}",
            f"{screened_differ} of {counts.tokens}",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--heads", choices=HEADS, nargs="*", default=list(HEADS))
    parser.add_argument("--filters", choices=FILTERS, nargs="*", default=list(FILTERS))
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    clock = time.process_time if given.threads == 1 else time.perf_counter
    print(f"{given.dtype}, {given.threads} threads, load {os.getloadavg()[0]:.1f}")
    columns = ["head", "B", "filter", "torch, ms", "native GEMM, ms", "screen, ms", "of torch", "of native"]
    columns += ["exact logits", "exact tokens", "open", "other tokens"]
    print("|", " | ".join(columns), "|")
    print("|", " | ".join(["---"] * len(columns)), "|")
    for name in given.heads:
        for rows in given.batches:
            hidden, weight = HEADS[name](rows, DTYPES[given.dtype])
            if rows == given.batches[0]:
                start = clock()
                code_weight(weight)
                coded = 1e3 * (clock() - start)
            for kind in given.filters:
                numbers = measured(hidden, weight, FILTERS[kind], rounds=given.rounds, clock=clock)
                print(f"| {name} | {rows} | {kind} | {numbers} |", flush=True)
        print(f"coding {name}'s weight once: {coded:.0f} ms", flush=True)


if __name__ == "__main__":
    main()
