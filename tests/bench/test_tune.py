"""Launch parameters are a pure function, and the tuner takes what is fast everywhere."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from bench.gpu import tune  # noqa: E402
from fastalign_kernels.softmax import rows_triton  # noqa: E402


def test_a_launch_is_a_function_of_architecture_and_vocabulary() -> None:
    old, new = rows_triton.Launch(2048, 4, 1), rows_triton.Launch(4096, 8)
    found = {
        (sm, V): rows_triton.tabled_launch({80: old, 100: new}, sm, V)
        for sm in (70, 80, 90, 100, 120)
        for V in (100, 1000, 3000, 151936)
    }
    assert [found[sm, 151936] for sm in (70, 80, 90, 100, 120)] == [old] * 3 + [new] * 2
    assert found[90, 3000] == old and found[100, 3000] == new
    # no lane beyond the row's next power of two, 16 logits a thread, as many threads in all
    assert found[90, 100] == (256, 1, 8) and found[90, 1000] == (1024, 2, 2)


def test_what_ships_is_a_launch_of_the_grid_for_all_kernels() -> None:
    names = {f"{kernel}_{bits}": tune.grid(kernel, bits) for kernel in tune.KERNELS for bits in tune.DTYPES}
    assert set(rows_triton.LAUNCH) == set(names)
    for name, grid in names.items():
        assert all(launch in grid for launch in rows_triton.LAUNCH[name].values())


def test_the_best_is_near_the_fastest_at_every_vocabulary() -> None:
    seconds = {
        1000: {(1024, 4, 0): 1.0, (2048, 4, 0): 1.1, (4096, 8, 0): 5.0},
        9000: {(1024, 4, 0): 30.0, (2048, 4, 0): 10.5, (4096, 8, 0): 10.0},
    }
    assert tune.best(seconds) == (2048, 4, 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_nothing_is_tuned() -> None:
    with pytest.raises(SystemExit, match="no GPU"):
        tune.main()
