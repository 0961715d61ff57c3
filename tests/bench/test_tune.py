"""Launch parameters are a pure function, and the tuner takes what is fast everywhere."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from bench.gpu import tune  # noqa: E402
from fastalign_kernels.softmax import rows_triton  # noqa: E402


def test_a_launch_is_a_function_of_architecture_and_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rows_triton.LAUNCH, "row_stats", {80: (2048, 4), 100: (4096, 8)})
    found = {
        (sm, V): rows_triton.launch(rows_triton.LAUNCH["row_stats"], sm, V)
        for sm in (70, 80, 90, 100, 120)
        for V in (100, 1000, 3000, 151936)
    }
    assert [found[sm, 151936] for sm in (70, 80, 90, 100, 120)] == [(2048, 4)] * 3 + [(4096, 8)] * 2
    assert found[90, 100] == (256, 1) and found[90, 1000] == (
        1024,
        2,
    )  # no lane beyond the row's next power of two, 16 a thread
    assert found[90, 3000] == (2048, 4) and found[100, 3000] == (4096, 8)


def test_what_ships_is_a_launch_of_the_grid_for_both_kernels() -> None:
    for table in rows_triton.LAUNCH.values():
        assert all(launch in tune.GRID for launch in table.values())
    assert set(rows_triton.LAUNCH) == {"row_stats", "row_grad"}


def test_the_best_is_near_the_fastest_at_every_vocabulary() -> None:
    seconds = {
        1000: {(1024, 4): 1.0, (2048, 4): 1.1, (4096, 8): 5.0},
        9000: {(1024, 4): 30.0, (2048, 4): 10.5, (4096, 8): 10.0},
    }
    assert tune.best(seconds) == (2048, 4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_nothing_is_tuned() -> None:
    with pytest.raises(SystemExit, match="no GPU"):
        tune.main()
