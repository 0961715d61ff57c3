"""The sampler's distribution, and mutants that must be caught."""

import ctypes
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from fastalign_kernels.sampling import sample
from tests.kernels.sampling_cases import ROOT, needs_native
from tests.kernels.sampling_checks import kept_mass, surprise
from tests.kernels.sampling_library import compiled, job_of, needs_compiler

# Distribution: draws of one row under as many sequence ids.

MANY = 1_048_576  # where what is rare is tested
DRAWS = MANY // 2
ROWS = "-DROWS", "-O2", "-march=native"


def tails() -> torch.Tensor:
    """One id holds the mass; thousands lie 16, 18 and 20 nats below it and are drawn 307, 42 and 6 times
    expected."""
    return torch.cat([torch.zeros(1), *(torch.full((2730,), -gap) for gap in (16.0, 18.0, 20.0))])


def ties() -> torch.Tensor:
    return torch.cat([torch.full((40,), 1.0), torch.full((400,), 0.0), torch.full((60,), -3.0)])


DISTRIBUTIONS: dict[str, tuple[torch.Tensor, dict[str, Any]]] = {
    "normal": (torch.randn(1000, generator=torch.Generator().manual_seed(1)) * 2, {}),
    "tempered": (torch.randn(777, generator=torch.Generator().manual_seed(2)), {"temperature": 0.6}),
    "tails": (tails(), {}),
    "ties under top_k": (ties(), {"top_k": 60}),
    "ties under top_p": (ties(), {"top_p": 0.5}),
    "top_k": (torch.randn(600, generator=torch.Generator().manual_seed(4)) * 3, {"top_k": 40}),
    "top_p": (torch.randn(600, generator=torch.Generator().manual_seed(3)) * 3, {"top_p": 0.95}),
}


def counted(draw, x: torch.Tensor, draws: int, **options: object) -> torch.Tensor:
    """How often each id of x [V] is drawn by draw(rows [n, V], sequence_ids [n], options)."""
    counts = torch.zeros(len(x), dtype=torch.int64)
    for first in range(0, draws, 2**17):
        ids = torch.arange(first, min(first + 2**17, draws))
        counts += torch.bincount(draw(x.expand(len(ids), -1), ids, options).cpu(), minlength=len(x))
    return counts


@needs_native
@pytest.mark.parametrize("case", DISTRIBUTIONS)
def test_the_distribution(case: str, device: str, request: pytest.FixtureRequest) -> None:
    x, options = DISTRIBUTIONS[case]
    torch.set_num_threads(2)  # rows are all it has to share out; conftest sets 1
    request.addfinalizer(lambda: torch.set_num_threads(1))
    drawn = counted(
        lambda rows, ids, o: sample(rows.to(device), seed=11, sequence_ids=ids.to(device), **o).token,
        x,
        MANY if case in ("normal", "tails") else DRAWS,
        **options,
    )
    mass = kept_mass(x, **options)
    assert drawn[mass == 0].sum() == 0, "an id that is not kept was drawn"
    deviate = surprise(drawn, mass)
    assert -5 < deviate < 4, f"{deviate:.1f} standard deviations"


# The CPU's rows without torch, and mutants of them.


def noise_is_right(library: ctypes.CDLL) -> bool:
    """Of 2^30 exponentials, as many lie below e^-gap as should: an id `gap` nats below the head wins with
    those alone."""
    limits = (ctypes.c_float * 4)(*(math.exp(-gap) for gap in (14, 16, 18, 20)))
    counts = (ctypes.c_int64 * 4)()
    library.count_below(ctypes.c_int64(2**30), limits, ctypes.c_int64(4), counts)
    expected = [2**30 * -math.expm1(-limit) for limit in limits]  # 893, 121, 16, 2
    return all(abs(count - mean) <= 3 * math.sqrt(mean) + 1 for count, mean in zip(counts, expected))


def distribution_is_right(library: ctypes.CDLL, case: str) -> bool:
    """The G-test of `test_the_distribution` on a library, with half of the draws."""

    def draw(rows, ids, options):
        job, found = job_of(rows, 11, sequence_ids=ids, **options)
        library.by_rows(ctypes.byref(job))
        return found.token

    x, options = DISTRIBUTIONS[case]
    counts, mass = counted(draw, x, DRAWS // 2, **options), kept_mass(x, **options)
    return bool(counts[mass == 0].sum() == 0) and -5 < surprise(counts, mass) < 4


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The source as it is."""
    return compiled("g++", tmp_path_factory.mktemp("rows"), *ROWS)


@pytest.mark.cpu_only
@needs_compiler
def test_ids_24_nats_below_the_head_are_drawn(rows: ctypes.CDLL) -> None:
    """One id, and 5,461, 21,845 and 87,381 others 16, 20 and 24 nats below it, expected to be drawn 644, 47
    and 4 times as a class.

    torch.multinomial's exponentials end at 2^-24, which is e^-17; FlashInfer's Gumbel noise ends sooner
    (research: vLLM #43150).
    """
    below = {16.0: 5461, 20.0: 21845, 24.0: 87381}
    x = torch.cat([torch.zeros(1), *(torch.full((number,), -gap) for gap, number in below.items())])
    classes = torch.arange(4).repeat_interleave(torch.tensor([1, *below.values()]))

    def drawn(first: int) -> torch.Tensor:
        ids = torch.arange(first, first + 2**17)  # by name: the job has its address only
        job, found = job_of(x.expand(2**17, -1), 5, sequence_ids=ids)
        rows.by_rows(ctypes.byref(job))
        return torch.bincount(classes[found.token], minlength=4)

    with ThreadPoolExecutor(2) as pool:
        counts = torch.stack(list(pool.map(drawn, range(0, MANY, 2**17)))).sum(0)
    masses = [1.0, *(number * math.exp(-gap) for gap, number in below.items())]
    mass = torch.tensor(masses, dtype=torch.float64)
    deviate = surprise(counts, mass / mass.sum())
    assert -5 < deviate < 4 and counts[3] > 0, (counts, mass / mass.sum() * MANY)


MUTANTS = {  # file, what is broken in it, and the test that must see it: "noise" or a distribution
    "24-bit uniforms": (
        "arithmetic.h",
        "const F u = fraction(c0, c1)",
        "const F u = fraction(c0 & 0xffffff00u, c1)",
        "noise",
    ),
    "one more id under top_k": ("rows.h", "n, true, o.top_k,", "n, true, o.top_k + 1,", "top_k"),
    "one fewer id under top_p": (
        "threshold.h",
        "if (double(above + in_bucket) >= target) break;",
        "if (in_bucket) break;",
        "top_p",
    ),
    "noise of the lane": (
        "rows.h",
        "exponentials(o.noise, first) / mass",
        "exponentials(o.noise, first % 32) / mass",
        "normal",
    ),
}


@pytest.mark.cpu_only
@needs_compiler
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_broken_sampler_is_caught(mutant: str, rows: ctypes.CDLL, tmp_path: Path) -> None:
    """A test that passes with the source as it is fails with its noise or a threshold broken."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    file, old, new, seen_by = MUTANTS[mutant]

    def passes(library: ctypes.CDLL) -> bool:
        return noise_is_right(library) if seen_by == "noise" else distribution_is_right(library, seen_by)

    source = (tmp_path / "csrc" / "sampling" / file).read_text()
    assert source.count(old) == 1
    (tmp_path / "csrc" / "sampling" / file).write_text(source.replace(old, new))
    broken = compiled("g++", tmp_path, *ROWS, root=tmp_path)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(passes, (rows, broken))) == [True, False]
