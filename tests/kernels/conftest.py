"""Fixtures of the tests of what every family of kernels uses."""

import pytest

from fastalign_kernels import native


@pytest.fixture
def forced_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our products on every CPU that runs them, as with FASTALIGN_GEMM=own; by itself that is AMD's alone."""
    monkeypatch.setattr(native, "_own_gemm", native.has_own_gemm())
