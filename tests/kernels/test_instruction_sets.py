"""The CPU kernels for narrower registers than this machine's, to which ATEN_CPU_CAPABILITY limits them.

Without it a machine with AVX-512 would never run the code for AVX2 and for SSE2.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastalign_kernels as kernels
from fastalign_kernels import native

ROOT = Path(__file__).parents[2]
LIMITS = {"default": "generic vectors", "avx2": "AVX2"}
pytestmark = [
    pytest.mark.skipif(bool(native.missing), reason=f"the native library is not there: {native.missing}"),
    pytest.mark.parametrize("limit", LIMITS),
]
V = 5003  # its last chunk of ids and its last vector are not full
SAMPLERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tempered": {"temperature": 0.7},
    "greedy": {"temperature": 0.0},
    "top_k": {"top_k": 50},
    "top_p": {"top_p": 0.9},
    "all filters": {"top_k": 400, "top_p": 0.95, "min_p": 0.01, "temperature": 1.3},
    "masks": {"top_p": 0.8, "repetition_penalty": 1.3},
}


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a usual, a flat, a peaked, a masked, an enormous and a broken row, and bit masks."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(6, V, generator=generator)
    logits[1] *= 0.01
    logits[2, 17] = 60
    logits[3, ::2] = -torch.inf
    logits[4, ::7] *= 1e3
    logits[5, 40] = torch.nan
    return logits, torch.randint(-(2**31), 2**31, (6, -(-V // 32)), generator=generator).int()


def draws(logits: torch.Tensor, bits: torch.Tensor) -> dict[str, kernels.Sample]:
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name, options in SAMPLERS.items():
            masks: dict[str, Any] = {"seen": bits, "allowed": bits.roll(1, 1)} if name == "masks" else {}
            found[f"{name} {dtype}"] = kernels.sample(logits.to(dtype), seed=3, **options, **masks)
    return found


def run(limit: str, *command: str) -> None:
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": limit}
    environment.pop("FASTALIGN_GEMM", None)  # native is refused without AVX-512
    done = subprocess.run(
        [sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


DRAW = """
import sys, torch
from fastalign_kernels import native
from tests.kernels.test_instruction_sets import draws
target = native.TARGETS[native.ops.cpu_target()]
found = draws(*torch.load(sys.argv[1]))  # made by the parent: torch.randn has other bits under a limit
torch.save({"target": target, "gemm": native.uses_gemm(), "draws": found}, sys.argv[2])
"""


def test_the_sampler_gives_the_same_bits(limit, tmp_path):
    given = inputs()
    torch.save(given, tmp_path / "inputs.pt")
    run(limit, "-c", DRAW, str(tmp_path / "inputs.pt"), str(tmp_path / "found.pt"))
    found = torch.load(tmp_path / "found.pt", weights_only=False)
    order = native.TARGETS.index
    assert order(found["target"]) == min(order(LIMITS[limit]), native.ops.cpu_target()) and not found["gemm"]
    for name, expected in draws(*given).items():
        for field, ours, theirs in zip(expected._fields, found["draws"][name], expected):
            if theirs is not None:  # kept_ids, for which nobody asked
                same = torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
                assert same, f"{name}: {field} is {ours.tolist()}, not {theirs.tolist()}"


def test_the_kernels_pass_their_tests(limit):
    """Against the specification in fp64: softmax, policy losses and whitening."""
    quiet = "-q", "-p", "no:cacheprovider"
    run(limit, "-m", "pytest", *quiet, "-k", "native", "tests/softmax", "tests/policy")
