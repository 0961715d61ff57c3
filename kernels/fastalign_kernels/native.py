"""Loads the native library built from csrc/, and says which parts of it, and of Triton, are there.

`setup.py` puts `_native.so` beside this file. The library is missing if it was not built (FASTALIGN_NATIVE=0)
or if torch cannot load it. dispatch.py says what runs instead.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch

from .namespace import NAMESPACE, ops

TARGETS = ("generic vectors", "AVX2", "AVX-512")  # the order of FASTALIGN_KERNELS in csrc/common/targets.h
# Ops that write into arguments and give nothing, which is all that a compiler must know of them.
WRITING = (
    *("row_stats", "row_grad", "column_sums", "column_grad"),
    *("gae_rows", "token_moments", "whiten_tokens"),
)
LIBRARY = Path(__file__).with_name("_native.so")


def _load() -> str:
    """Load the library; the reason why there is none, or the empty string."""
    if not LIBRARY.exists():
        return (
            "the native library is not there (installed with FASTALIGN_NATIVE=0, or run from sources that "
            "were not installed)"
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"the native library does not load: {error}"
    for op in WRITING:
        torch.library.register_fake(f"{NAMESPACE}::{op}", lambda *arguments: None)
    return ""


missing = _load()
triton_missing = "" if importlib.util.find_spec("triton") else "triton is not installed"


def has_gemm() -> bool:
    """Whether csrc/gemm can multiply matrices on this CPU: it needs AVX-512."""
    return not missing and TARGETS[ops.cpu_target()] == "AVX-512"


_has_int8_gemm = has_gemm() and bool(ops.cpu_int8_gemm())


def has_int8_gemm() -> bool:
    """Whether csrc/int8 can multiply 8-bit codes on this CPU: it needs AVX-512 VNNI."""
    return _has_int8_gemm


def _choose_gemm() -> bool:
    choice = os.environ.get("FASTALIGN_GEMM") or None
    if choice is None:
        return not missing and ops.cpu_prefers_native_gemm()
    if choice not in ("native", "torch"):
        raise ValueError(
            f"FASTALIGN_GEMM: got {choice!r}, expected native or torch, "
            "or nothing for the faster one on this CPU"
        )
    if choice == "native" and not has_gemm():
        reason = missing or "this CPU has no AVX-512"
        raise ValueError(f"FASTALIGN_GEMM: got 'native', expected torch: {reason}")
    return choice == "native"


_uses_gemm = _choose_gemm()


def uses_gemm() -> bool:
    """Whether csrc/gemm multiplies matrices, not torch: on AMD CPUs with AVX-512, or as FASTALIGN_GEMM
    (native or torch) says."""
    return not missing and _uses_gemm


# Devices that the library samples on.
samples_on = frozenset(
    device
    for device, key in (("cpu", "CPU"), ("cuda", "CUDA"))
    if not missing and torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::sample", key)
)
cuda_missing = missing or ("" if "cuda" in samples_on else "the native library was built without nvcc")


def _gemm_status() -> tuple[str, str]:
    if uses_gemm():
        return "native, AVX-512", ""
    why = (
        "FASTALIGN_GEMM=torch"
        if os.environ.get("FASTALIGN_GEMM")
        else "the CPU is no AMD with AVX-512, where torch's are slower"
    )
    return "torch's", missing or why


def status() -> list[tuple[str, str, str]]:
    """(what, state, why) for each piece that can be native or fall back."""
    native = f"native, {TARGETS[ops.cpu_target()]}" if not missing else "reference, in PyTorch"
    triton = "Triton" if not triton_missing else "reference, in PyTorch"
    unused = "" if torch.cuda.is_available() else "unused: torch sees no CUDA device"
    sampler = native if "cpu" in samples_on else "reference, in PyTorch"
    cuda = "native, CUDA" if "cuda" in samples_on else "reference, in PyTorch"
    return [
        ("CPU row kernels", native, missing),
        ("GPU row kernels", triton, triton_missing or unused),
        ("CPU matrix products", *_gemm_status()),
        ("CPU sampler", sampler, missing),
        ("GPU sampler", cuda, missing or cuda_missing or unused),
    ]
