"""Fixtures of the head's tests."""

import pytest

from fastalign_kernels.linear import screen
from fastalign_kernels.linear.gpu import plan as gpu_plan


@pytest.fixture
def tiny_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 8 and of 4 tokens in the GPU engines."""
    monkeypatch.setattr(gpu_plan, "TILES", (8, 4))
    monkeypatch.setattr(gpu_plan, "GRANULE", 4)


@pytest.fixture
def small_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 5000 columns, more than a 32nd may matter."""
    monkeypatch.setattr(screen, "LARGEST_SHARE", 1.0)
