"""Fixtures of the head's tests."""

import pytest

from fastalign_kernels.linear import gpu_plan


@pytest.fixture
def tiny_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 8 and of 4 tokens in the GPU engines."""
    monkeypatch.setattr(gpu_plan, "TILES", (8, 4))
    monkeypatch.setattr(gpu_plan, "GRANULE", 4)
