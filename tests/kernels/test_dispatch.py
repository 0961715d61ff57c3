"""Which implementation serves a tensor: the native library, Triton or the reference."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from fastalign_kernels import dispatch, native, sampling
from fastalign_kernels.policy import advantages
from fastalign_kernels.policy import ops as policy
from fastalign_kernels.preference import ops as preference
from fastalign_kernels.softmax import columns, rows

FP32, FP64 = torch.float32, torch.float64
ALL = {
    "rows": rows.KERNELS,
    "columns": columns.KERNELS,
    "policy": policy.KERNELS,
    "advantages": advantages.KERNELS,
    "preference": preference.KERNELS,
    "sampling": sampling.KERNELS,
}


def on(device, dtype):
    return SimpleNamespace(is_cuda=device == "cuda", dtype=dtype)


def served_by(kernels, tensor):
    chosen = kernels.select(tensor)
    if chosen is kernels.native:
        return "native"
    return "reference" if chosen is kernels.reference else "triton"


@pytest.fixture(autouse=True)
def whole_installation(monkeypatch):
    """The library with its CUDA part, and Triton, wherever the tests run."""
    for part in ("missing", "cuda_missing", "triton_missing"):
        monkeypatch.setattr(native, part, "")
    monkeypatch.setattr(dispatch, "import_module", lambda name, package: SimpleNamespace(name=name))
    for kernels in ALL.values():
        monkeypatch.setattr(kernels, "_triton_module", None)
    dispatch.warn_once.cache_clear()


@pytest.mark.parametrize(
    "family, cpu, cpu_fp64, gpu, gpu_fp64",
    [
        ("rows", "native", "native", "triton", "triton"),
        ("columns", "native", "native", "triton", "triton"),
        ("policy", "native", "native", "triton", "reference"),
        ("advantages", "native", "native", "triton", "triton"),
        ("preference", "reference", "reference", "triton", "reference"),
        ("sampling", "native", "reference", "native", "reference"),
    ],
)
def test_each_family_is_served_by_its_kernels(family, cpu, cpu_fp64, gpu, gpu_fp64):
    found = [
        served_by(ALL[family], on(*kind))
        for kind in (("cpu", FP32), ("cpu", FP64), ("cuda", FP32), ("cuda", FP64))
    ]
    assert found == [cpu, cpu_fp64, gpu, gpu_fp64]


@pytest.mark.parametrize("family", ALL)
def test_the_reference_serves_if_the_library_is_missing(family, monkeypatch):
    monkeypatch.setattr(native, "missing", "not built")
    assert served_by(ALL[family], on("cpu", FP32)) == "reference"


@pytest.mark.parametrize("family", ALL)
def test_a_missing_part_of_the_gpu_is_named_once_and_the_reference_serves(family, monkeypatch):
    part = "cuda_missing" if family == "sampling" else "triton_missing"
    monkeypatch.setattr(native, part, "it was not installed")
    with pytest.warns(UserWarning, match="fastalign: it was not installed; the references in PyTorch serve"):
        assert served_by(ALL[family], on("cuda", FP32)) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert served_by(ALL[family], on("cuda", FP32)) == "reference"


def test_the_modules_of_triton_are_those_that_exist(monkeypatch):
    monkeypatch.undo()
    pytest.importorskip("triton", reason="triton is not installed")
    for kernels in ALL.values():
        if kernels.triton is not None:
            module = dispatch.import_module(kernels.triton, "fastalign_kernels")
            assert all(callable(getattr(module, name)) for name in vars(kernels.reference))
