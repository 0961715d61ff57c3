"""sampling_emulator.cpp as a library: the sampler without torch, by g++ and by nvcc."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastalign_kernels.sampling import Sample
from tests.kernels.sampling_cases import ROOT

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


class Job(ctypes.Structure):
    """SampleJob of csrc/sampling/api.h."""

    _fields_ = [
        ("logits", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("B", "V", "row_stride")),
        ("table", ctypes.c_void_p),
        ("numbers", ctypes.c_double * 5),
        ("seed", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("sequence_ids", "positions", "seen", "allowed", "finished")),
        ("pad_id", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("token", "logs", "kept", "valid")),
    ]


def job_of(x, seed, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, **tensors):
    """A job, and the Sample that running it fills."""
    B, V = x.shape
    token, kept = torch.zeros(B, dtype=torch.int64), torch.zeros(B, dtype=torch.int64)
    logs, valid = torch.zeros(4, B), torch.zeros(B, dtype=torch.bool)
    job = Job(
        x.data_ptr(),
        B,
        V,
        x.stride(0),
        None,
        (temperature, top_k, top_p, min_p, repetition_penalty),
        seed,
        pad_id=-1,
    )
    for name, tensor in [
        *tensors.items(),
        *zip(("token", "logs", "kept", "valid"), (token, logs, kept, valid)),
    ]:
        setattr(job, name, tensor.data_ptr())
    return job, Sample(token, logs[0], logs[1], logs[2], logs[3], kept, valid)


COMPILERS = {
    "g++": [
        "g++",
        "-std=c++20",
        "-fPIC",
        "-shared",
        "-Wno-psabi",
        "-Wno-maybe-uninitialized",
        "-ffp-contract=off",
    ],
    "nvcc": [
        "nvcc",
        "-std=c++20",
        "-arch=sm_80",  # the oldest that setup.py builds for
        "-fmad=false",
        "-Xcompiler",
        "-fPIC,-ffp-contract=off",
        "-x",
        "cu",
        "-shared",
    ],
}


def compiled(compiler: str, folder: Path, *flags: str, root: Path = ROOT) -> ctypes.CDLL:
    library = folder / f"{compiler}.so"
    command = [
        *COMPILERS[compiler],
        *flags,
        str(root / "tests" / "kernels" / "sampling_emulator.cpp"),
        "-o",
        str(library),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return ctypes.CDLL(str(library))
