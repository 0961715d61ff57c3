"""The heads of real models, and how many tokens of each this machine can measure."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from .operation import Absent, Shape

HEADS = {  # (H, V): hidden_size and vocab_size of the models' configs
    "SmolLM2-135M": (576, 49152),
    "Qwen3-0.6B": (1024, 151936),
    "Llama-3.2-1B": (2048, 128256),
    "Gemma-2-2B": (2304, 256000),
    "Llama-3-8B": (4096, 128256),
    "Qwen3-8B": (4096, 151936),
}
# The default head and dtype of a case: what a machine of this kind is used for.
HEAD, DTYPE = ("Llama-3-8B", "bf16") if torch.cuda.is_available() else ("SmolLM2-135M", "fp32")
# Bytes that a case holds for each element of the weight: the fp64 weight, two gradients while chunks are
# added up, and a method's copies.
BYTES_PER_WEIGHT = 36
# Tokens of a case. On a CPU: what three GEMMs process in about a second on two cores, rounded down to a power
# of two, at least FEWEST.
GPU_TOKENS = 8192
CPU_FLOPS = 1.8e11
FEWEST = 64
USUAL = Shape(GPU_TOKENS if DTYPE == "bf16" else 1024, *HEADS[HEAD])
# For cases next to the main ones, so that the whole suite ends in time on two cores.
HALF = USUAL._replace(N=USUAL.N // 2)


def sized(H: int, V: int, device: str, memory_bytes: int) -> int:
    """How many tokens a case of a head [V, H] gets on a device with so much memory.

    Raises:
        Absent: the head is too big or too slow for the machine; the message says by how much.
    """
    needed = BYTES_PER_WEIGHT * H * V
    if needed > memory_bytes:
        raise Absent(
            f"head [{V}, {H}]: got a machine with {memory_bytes / 2**30:.0f} GiB, "
            f"expected at least {needed / 2**30:.0f} GiB"
        )
    if device == "cuda":
        return GPU_TOKENS
    tokens = 1 << int(CPU_FLOPS / (6 * H * V)).bit_length() - 1
    if tokens < FEWEST:
        raise Absent(
            f"head [{V}, {H}]: got {tokens} tokens in the time of a case, expected at least {FEWEST}"
        )
    return tokens


def memory_bytes(device: str) -> int:
    """Memory of the GPU, or of the machine, in bytes."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    if Path("/proc/meminfo").exists():
        return int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
