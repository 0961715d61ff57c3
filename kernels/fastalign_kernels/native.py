"""The native library built from csrc/: loading it, and what runs without it.

`setup.py` puts `_native.so` beside this file. Where it was not built (FASTALIGN_NATIVE=0), or torch cannot
load it, PyTorch serves in its place: `rows.row_stats_ref`, `rows.row_grad_ref`, `sampling.sample_ref`, and
the twins in policy/losses.py and policy/advantages.py. That is said once, by name, and `fastalign env` shows it.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from functools import cache
from pathlib import Path

import torch

TARGETS = ("generic vectors", "AVX2", "AVX-512")  # the order of ops.cpp's target indices
# Ops that write into arguments and give nothing, which is all that a compiler must know of them.
WRITING = (
    *("row_stats", "row_grad", "column_sums", "column_grad"),
    *("policy_tokens", "value_tokens", "gae_rows", "token_moments", "whiten_tokens"),
)
LIBRARY = Path(__file__).with_name("_native.so")


def _load() -> str:
    """Load the library; the reason why there is none, or the empty string."""
    if not LIBRARY.exists():
        return "the native library is not there (installed with FASTALIGN_NATIVE=0, or run from sources that were not installed)"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"the native library does not load: {error}"
    for op in WRITING:
        torch.library.register_fake(f"fastalign::{op}", lambda *arguments: None)
    return ""


missing = _load()
if missing:
    substitutes = "rows.row_stats_ref, rows.row_grad_ref, sampling.sample_ref and PyTorch in policy/losses.py and policy/advantages.py"
    warnings.warn(f"fastalign: {missing}; {substitutes} serve instead", stacklevel=2)
triton_missing = "" if importlib.util.find_spec("triton") else "triton is not installed"


def has_own_gemm() -> bool:
    """Whether csrc/gemm.cpp can multiply matrices on this CPU: it needs AVX-512."""
    return not missing and TARGETS[torch.ops.fastalign.cpu_target()] == "AVX-512"


def _choose_gemm() -> bool:
    wanted = os.environ.get("FASTALIGN_GEMM") or None
    if wanted is None:
        return not missing and torch.ops.fastalign.cpu_own_gemm()
    if wanted not in ("own", "torch"):
        raise ValueError(
            f"FASTALIGN_GEMM: got {wanted!r}, expected own or torch, or nothing for the faster one on this CPU"
        )
    if wanted == "own" and not has_own_gemm():
        raise ValueError(f"FASTALIGN_GEMM: got 'own', expected torch: {missing or 'this CPU has no AVX-512'}")
    return wanted == "own"


_own_gemm = _choose_gemm()


def own_gemm() -> bool:
    """Whether csrc/gemm.cpp multiplies matrices, not torch: on AMD CPUs with AVX-512, or as FASTALIGN_GEMM
    (own or torch) says."""
    return not missing and _own_gemm


# Devices that the library samples on.
samples_on = frozenset(
    device
    for device, key in (("cpu", "CPU"), ("cuda", "CUDA"))
    if not missing and torch._C._dispatch_has_kernel_for_dispatch_key("fastalign::sample", key)
)


@cache
def warn_cuda_sampler_missing() -> None:
    """Say, at the first draw on a GPU without the CUDA sampler, what serves instead."""
    warnings.warn(
        "fastalign: the native library was built without nvcc; sampling.sample_ref serves the GPU instead",
        stacklevel=2,
    )


@cache
def warn_triton_missing() -> None:
    """Say, at the first use of a GPU without Triton, what serves instead."""
    warnings.warn(
        f"fastalign: {triton_missing}; rows.row_stats_ref and rows.row_grad_ref serve the GPU instead",
        stacklevel=2,
    )


def _gemm_status() -> tuple[str, str]:
    if own_gemm():
        return "native, AVX-512", ""
    why = (
        "FASTALIGN_GEMM=torch"
        if os.environ.get("FASTALIGN_GEMM")
        else "the CPU is no AMD with AVX-512, where torch's are slower"
    )
    return "torch's", missing or why


def status() -> list[tuple[str, str, str]]:
    """(what, state, why) for each piece that can be native or fall back."""
    native = (
        f"native, {TARGETS[torch.ops.fastalign.cpu_target()]}" if not missing else "reference, in PyTorch"
    )
    triton = "Triton" if not triton_missing else "reference, in PyTorch"
    unused = "" if torch.cuda.is_available() else "unused: torch sees no CUDA device"
    sampler = native if "cpu" in samples_on else "reference, in PyTorch"
    cuda = "native, CUDA" if "cuda" in samples_on else "reference, in PyTorch"
    no_cuda = missing or ("" if "cuda" in samples_on else "the native library was built without nvcc")
    return [
        ("CPU row kernels", native, missing),
        ("GPU row kernels", triton, triton_missing or unused),
        ("CPU matrix products", *_gemm_status()),
        ("CPU sampler", sampler, missing),
        ("GPU sampler", cuda, no_cuda or unused),
    ]
