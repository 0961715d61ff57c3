"""The native library's status, its refusals, and the installation without it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastalign_kernels import native
from fastalign_kernels.softmax.rows import Transform

ROOT = Path(__file__).parents[2]


def test_status_says_what_is_native_and_why_not(monkeypatch):
    rows = {what: (state, why) for what, state, why in native.status()}
    state, why = rows["CPU row kernels"]
    assert (
        (state.startswith("native, ") and state[8:] in native.TARGETS)
        if not native.missing
        else why == native.missing
    )
    monkeypatch.setattr(native, "missing", "no compiler")
    assert native.status()[0] == ("CPU row kernels", "reference, in PyTorch", "no compiler")


@pytest.mark.parametrize(
    "choice, said",
    [
        ("native", "('native',"),
        ("torch", "('torch',"),
        ("mkl", "got 'mkl', expected native or torch"),
    ],
)
def test_the_environment_chooses_the_gemm(choice, said):
    if choice == "native" and not native.has_gemm():
        said = "FASTALIGN_GEMM: got 'native', expected torch"
    code = (
        "from fastalign_kernels import native; "
        "print(('native' if native.uses_gemm() else 'torch', native.status()[2][2]))"
    )
    environment = {**os.environ, "FASTALIGN_GEMM": choice}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert said in run.stdout + run.stderr and (run.returncode == 0) == ("FASTALIGN_GEMM:" not in run.stderr)
    assert choice != "torch" or "FASTALIGN_GEMM=torch" in run.stdout


@pytest.mark.skipif(bool(native.missing), reason=f"the native library is not there: {native.missing}")
@pytest.mark.parametrize(
    "change, said",
    [
        ({"logits": torch.zeros(3, 7)}, r"logits: got fp32 \[3, 7\], expected \[B, T, V\]"),
        ({"logits": torch.zeros(1, 3, 14)[..., ::2]}, "unit stride"),
        (
            {"logits": torch.zeros(1, 3, 7, dtype=torch.int32)},
            r"logits: got int32 \[1, 3, 7\], expected fp32, fp64, bf16 or fp16",
        ),
        (
            {"ids": torch.zeros(4, dtype=torch.int64)},
            r"ids: got int64 \[4\], expected contiguous int64 \[3\]",
        ),
        ({"ids": torch.tensor([0, 7, 0])}, r"ids: got 7 at 1, expected ids below 7"),
        ({"bias": torch.zeros(6)}, r"bias: got fp32 \[6\], expected contiguous fp32 \[7\]"),
        (
            {"stats": torch.zeros(7, 3, dtype=torch.float64)},
            r"stats: got fp64 \[7, 3\], expected contiguous fp32 \[7, 3\]",
        ),
        ({"stats": torch.zeros(6, 3)}, r"stats: got fp32 \[6, 3\], expected contiguous fp32 \[7, 3\]"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_the_launcher_checks_its_arguments(change, said):
    arguments = {
        "logits": torch.zeros(1, 3, 7),
        "ids": torch.zeros(3, dtype=torch.int64),
        "bias": None,
        "stats": torch.zeros(7, 3),
    } | change
    with pytest.raises(RuntimeError, match=said):
        torch.ops.fastalign.row_stats(
            arguments["logits"], arguments["ids"], arguments["bias"], *Transform(), arguments["stats"]
        )


@pytest.mark.cpu_only
def test_without_the_library_the_package_says_so_and_works(tmp_path):
    """A copy of the package without _native.so: one warning that names the reason, and the same loss from the
    reference."""
    shutil.copytree(
        ROOT / "kernels" / "fastalign_kernels",
        tmp_path / "fastalign_kernels",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    code = (
        "import torch, fastalign_kernels as k; from fastalign_kernels import native; "
        "print(native.LIBRARY.parent, "
        "k.linear_cross_entropy(torch.ones(2, 3), torch.zeros(4, 3), torch.tensor([0, 1])).item())"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    folder, loss = run.stdout.split()
    assert folder == str(tmp_path / "fastalign_kernels") and abs(float(loss) - 1.3862943) < 1e-6
    assert run.stderr.count("UserWarning") == 1 and "FASTALIGN_NATIVE=0" in run.stderr


@pytest.mark.skipif(bool(native.missing), reason=f"the native library is not there: {native.missing}")
def test_opcheck():
    logits, ids, stats = torch.randn(2, 3, 7), torch.tensor([0, 6, -1, 3, 2, 1]), torch.zeros(7, 6)
    torch.library.opcheck(
        torch.ops.fastalign.row_stats.default, (logits, ids, torch.randn(7), *Transform(), stats)
    )
    torch.ops.fastalign.row_stats(logits, ids, None, *Transform(), stats)
    arguments = (
        logits,
        ids,
        None,
        *Transform(0.5, 3.0, 2.0),
        stats,
        torch.randn(4, 6),
        torch.empty_like(logits).zero_(),
    )
    torch.library.opcheck(torch.ops.fastalign.row_grad.default, arguments)
