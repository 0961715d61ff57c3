"""Float options reach every Triton kernel with all their digits: Triton passes a Python float as fp32 unless
the parameter is annotated."""

import importlib
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from fastalign_kernels.policy import advantages_triton as advantage_triton  # noqa: E402
from fastalign_kernels.triton_options import as_scalar  # noqa: E402

FOLDER = Path(__file__).parents[2] / "kernels" / "fastalign_kernels"
# What a kernel takes besides pointers and constexprs: sizes and strides are integers, all else is a float
# option.
INTEGERS = {
    *("B", "C", "N", "T", "V", "K", "S", "P", "H", "first", "rows", "col_tiles", "sample"),
    *("V_slice", "first_token", "first_column", "count", "keep_places"),
    *("chunk", "live", "part_rows", "parts", "slice_columns", "tiles"),  # of the tail's kernels
    *("width", "kept_tiles", "slices"),  # of the screen's
}


@triton.jit
def scale_kernel(out, annotated: tl.float64, plain):
    tl.store(out, as_scalar(annotated, tl.float64))
    tl.store(out + 1, as_scalar(plain, tl.float64))


def test_an_option_without_annotation_is_rounded_to_fp32_here_as_on_a_gpu(device):
    """What conftest.py adds to the interpreter. Without it no test on a CPU could see a lost digit."""
    out = torch.empty(2, dtype=torch.float64, device=device)
    scale_kernel[(1,)](out, 0.1, 0.1)
    assert out[0].item() == 0.1 and out[1].item() == torch.tensor(0.1).double().item() != 0.1


def scalar_parameters(kernel):
    """Names of the parameters that are neither pointers, of which the source says the shape in a comment, nor
    constexprs."""
    source = kernel.fn.__code__
    names = source.co_varnames[: source.co_argcount]
    lines = Path(source.co_filename).read_text().splitlines()[source.co_firstlineno :]
    pointers = {line.split(",")[0].strip() for line in lines if "# [" in line or "# scalar" in line}
    constexprs = {name for name, kind in kernel.fn.__annotations__.items() if kind == "tl.constexpr"}
    return [
        name
        for name in names
        if name not in pointers | constexprs and name not in INTEGERS and not name.endswith("stride")
    ]


def test_every_float_option_of_every_kernel_is_annotated():
    found = {}
    for path in FOLDER.glob("*/**/*_triton.py"):
        name = ".".join(path.relative_to(FOLDER).with_suffix("").parts)
        module = importlib.import_module(f"fastalign_kernels.{name}")
        for name, kernel in vars(module).items():
            if name.endswith("_kernel"):
                found |= {
                    f"{name}.{option}": kernel.fn.__annotations__.get(option)
                    for option in scalar_parameters(kernel)
                }
    assert {
        "row_grad_kernel.temperature",
        "gae_kernel.gamma",
        "pairs_kernel.beta",
        "policy_kernel.lower",
    } <= found.keys()
    assert {name for name, kind in found.items() if kind != "tl.float64"} == set()


def test_gae_in_fp64_has_fp64_digits(device):
    """A[t] = r[t] + gamma V[t + 1] - V[t] + gamma lam A[t + 1], by the kernel that a GPU runs."""
    gamma, lam, B, T = 0.97, 0.9, 2, 5
    generator = torch.Generator().manual_seed(0)
    rewards, values = (
        torch.randn(B, T, generator=generator, dtype=torch.float64).to(device) for _ in range(2)
    )
    advantages, returns = torch.empty_like(values), torch.empty_like(values)
    mask = torch.ones(B, T, dtype=torch.bool, device=device)
    advantage_triton.gae_rows(rewards, values, mask, None, gamma, lam, advantages, returns)
    running = following = torch.zeros(B, dtype=torch.float64, device=device)
    for t in reversed(range(T)):
        running = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * running
        following = values[:, t]
        torch.testing.assert_close(advantages[:, t], running, rtol=1e-14, atol=1e-14)
