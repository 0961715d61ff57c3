"""Fixtures of the tests of what every family of kernels uses."""

import pytest

from fastalign_kernels import native


@pytest.fixture
def forced_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The native GEMM on every CPU that runs it, as with FASTALIGN_GEMM=native. By default only AMD's do."""
    monkeypatch.setattr(native, "_uses_gemm", native.has_gemm())
