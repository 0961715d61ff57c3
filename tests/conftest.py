"""Shared by all tests: one thread, Triton's interpreter where there is no GPU, memory that is poisoned until
it is written."""

import os

# Threads that wait would spin, and take the core of the other pytest worker: two threads took 5 times the CPU
# seconds.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# torch.compile trusts /proc/cpuinfo. Else it compiles and runs a program for each instruction set.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import torch  # noqa: E402
import torch.utils._device  # noqa: E402

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before any @triton.jit is seen

import numpy as np  # noqa: E402
import pytest  # noqa: E402

from tests.tolerance import assert_no_worse_than_eager  # noqa: E402

try:
    import triton.language as tl
    from triton.runtime import interpreter
except ImportError:  # triton is absent on macOS and Windows
    interpreter = None

# Two threads on a shared two-core machine were measured 3-8 times slower than one.
torch.set_num_threads(1)


def _round_floats_as_a_gpu_does() -> None:
    """Let Triton's interpreter lose the digits that a GPU loses: a Python float arrives as fp32 unless its
    parameter is annotated."""
    launch = interpreter.GridExecutor.__call__

    def rounding_launch(self, *args, **kwargs):
        # The annotations are strings, since our files import annotations from __future__.
        annotations = self.fn.__annotations__

        def arriving(name, value):
            return float(np.float32(value)) if isinstance(value, float) and name not in annotations else value

        with np.errstate(over="ignore"):
            rounded = [arriving(name, value) for name, value in zip(self.arg_names, args)]
            named = {name: arriving(name, value) for name, value in kwargs.items()}
        return launch(self, *rounded, **named)

    interpreter.GridExecutor.__call__ = rounding_launch


def _multiply_bf16() -> None:
    """Let Triton's interpreter multiply bf16: it takes the bits of such numbers for integers."""
    create_dot = interpreter.InterpreterBuilder.create_dot

    def widened(factor):
        if factor.dtype.scalar != tl.bfloat16:
            return factor
        bits = np.ascontiguousarray(factor.data).astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def dot(self, a, b, *rest):
        return create_dot(self, widened(a), widened(b), *rest)

    interpreter.InterpreterBuilder.create_dot = dot


if interpreter is not None and not GPU:
    _round_floats_as_a_gpu_does()
    _multiply_bf16()


# What a fixture of these modules makes takes up to a minute of two processes.
LONG_FIXTURES = ("tests/stages/sharding/", "tests/bench/test_aot.py", "tests/linear/test_sharded.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the modules with long fixtures first.

    An idle worker of pytest-xdist takes tests from the end of another one's list. Where it took some of a
    module, it made the fixture again.
    """
    items.sort(key=lambda item: not item.nodeid.startswith(LONG_FIXTURES))


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernel tests run: the GPU if there is one."""
    return "cuda" if GPU else "cpu"


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty and its kin return with NaN, so that an element nobody wrote fails the test."""
    # A cached set of functions, torch.empty among them. Made under the patch (by torch.compile, say), it
    # would keep `torch.device("meta")` from torch.empty for the rest of the process, and from_pretrained
    # would draw other initial weights.
    torch.utils._device._device_constructors()

    def poison(allocate):
        def poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return poisoned

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture(scope="session")
def no_worse_than_eager():
    """The tolerance of every numerical test: see tolerance.py."""
    return assert_no_worse_than_eager
