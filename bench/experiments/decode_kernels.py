"""Kernels of a rollout's decode step, eager and compiled: `python -m bench.experiments.decode_kernels`.

A step of a small model takes as long as its launches. The model is SmolLM2-135M's architecture with random
weights; --layers makes it smaller. On a GPU a trace counts the kernels that the device ran. On a CPU it
counts the operators that compute something, and the kernels that the compiler generated.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from typing import Any

import torch

from fastalign.probe import probing
from fastalign.rollout.decoding import Decoding

# Operators that compute nothing: they return a view, or memory.
FREE = frozenset(
    f"aten::{name}"
    for name in (
        *("alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "lift_fresh"),
        *("permute", "reshape", "resize_", "resolve_conj", "resolve_neg", "select", "slice", "squeeze", "t"),
        *("transpose", "unsqueeze", "view", "_unsafe_view", "_reshape_alias", "unbind", "split", "chunk"),
        *(
            "new_empty",
            "is_nonzero",
            "item",
            "_local_scalar_dense",
            "narrow",
            "unflatten",
            "result_type",
            "to",
        ),
    )
)
WARM_UP = 3  # the first step compiles, the second finds what was specialised


def llama(layers: int, device: str, dtype: torch.dtype) -> Any:
    """A Llama of SmolLM2-135M's sizes."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.LlamaForCausalLM(config).to(dtype).eval()


def decoding(model: Any, rows: int, *, compile_step: bool, prompt: int = 16, new: int = 64) -> Decoding:
    """A rollout of random prompts after its prefill. Enter `probing(model)` before."""
    device = next(model.parameters()).device
    ids = torch.randint(0, model.config.vocab_size, (rows, prompt), device=device)
    options = {"seed": 0, "temperature": 1.0, "top_k": 0, "top_p": 0.9, "min_p": 0.0, "pad_id": 0}
    return Decoding(
        model,
        model,
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        eos=[],
        options=options | {"sequence_ids": None, "repetition_penalty": 1.0, "allowed": None},
        compile_step=compile_step,
    )


def kernels(state: Decoding) -> Counter[str]:
    """The kernels of a step by name, after WARM_UP steps."""
    for _ in range(WARM_UP):
        state.step()
    on_gpu = state.token.is_cuda
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA] if on_gpu else [activity.CPU]) as trace:
        state.step()
        if on_gpu:
            torch.cuda.synchronize()
    events = trace.events()
    assert events is not None
    if on_gpu:
        return Counter(event.name for event in events)
    counted: Counter[str] = Counter()
    for event in events:
        if event.cpu_parent is None:
            _count(event, counted)
    return counted


def _count(event: Any, counted: Counter[str]) -> bool:
    """Count the innermost operators below an event that compute something; whether there was one."""
    inner = [_count(child, counted) for child in event.cpu_children]
    if any(inner):
        return True
    computes = event.name.startswith(("aten::", "fastalign::", "graph_")) and event.name not in FREE
    if computes:
        counted[event.name] += 1
    return computes


def milliseconds(state: Decoding, steps: int = 10) -> float:
    """The time of a step, host and device, without a graph."""
    if state.token.is_cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(steps):
        state.step()
    if state.token.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3 / steps


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.experiments.decode_kernels")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--layers", type=int, default=30 if device == "cuda" else 2)
    parser.add_argument("--rows", type=int, default=64 if device == "cuda" else 4)
    parser.add_argument("--most", type=int, default=12, help="kernels to name")
    given = parser.parse_args(argv)
    model = llama(given.layers, device, torch.bfloat16 if device == "cuda" else torch.float32)
    torch._inductor.config.cpp.enable_kernel_profile = True  # names the generated kernels in a CPU's trace
    with probing(model):
        for compile_step in (False, True):
            state = decoding(model, given.rows, compile_step=compile_step)
            counted = kernels(state)
            print(
                f"{'compiled' if compile_step else 'eager'}: {counted.total()} kernels a step of "
                f"{given.layers} layers, {milliseconds(state):.2f} ms without a graph"
            )
            for name, number in counted.most_common(given.most):
                print(f"{number:6} {name[:100]}", flush=True)


if __name__ == "__main__":
    main()
