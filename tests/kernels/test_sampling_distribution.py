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

# Distribution: draws of one row under 2 * 10^6 sequence ids.

DRAWS = 2_097_152


def tails() -> torch.Tensor:
    """One id holds the mass; thousands lie 16, 18 and 20 nats below it and are drawn 614, 83 and 11 times
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


def counted(draw, x: torch.Tensor, draws: int = DRAWS, **options: object) -> torch.Tensor:
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
    """The G-test of `test_the_distribution` on a library, with an eighth of the draws."""

    def draw(rows, ids, options):
        job, found = job_of(rows, 11, sequence_ids=ids, **options)
        library.by_rows(ctypes.byref(job))
        return found.token

    x, options = DISTRIBUTIONS[case]
    counts, mass = counted(draw, x, DRAWS // 8, **options), kept_mass(x, **options)
    return bool(counts[mass == 0].sum() == 0) and -5 < surprise(counts, mass) < 4


@pytest.mark.cpu_only
@needs_compiler
def test_ids_24_nats_below_the_head_are_drawn(tmp_path: Path) -> None:
    """One id and 3 * 87,381 others 16, 20 and 24 nats below it, drawn 20,600, 378 and 7 times expected: what
    they are drawn as a class.

    torch.multinomial's exponentials end at 2^-24, which is e^-17; FlashInfer's Gumbel noise ends sooner
    (research: vLLM #43150).
    """
    tail = 87381
    x = torch.cat([torch.zeros(1), *(torch.full((tail,), -gap) for gap in (16.0, 20.0, 24.0))])
    library = compiled("g++", tmp_path, "-march=native")

    def drawn(first: int) -> torch.Tensor:
        ids = torch.arange(first, first + 2**17)  # by name: the job has its address only
        job, found = job_of(x.expand(2**17, -1), 5, sequence_ids=ids)
        library.by_rows(ctypes.byref(job))
        return torch.bincount((found.token + tail - 1) // tail, minlength=4)

    with ThreadPoolExecutor(2) as pool:
        counts = torch.stack(list(pool.map(drawn, range(0, DRAWS, 2**17)))).sum(0)
    mass = torch.tensor([1.0, *(tail * math.exp(-gap) for gap in (16, 20, 24))], dtype=torch.float64)
    deviate = surprise(counts, mass / mass.sum())
    assert -5 < deviate < 4 and counts[3] > 0, (counts, mass / mass.sum() * DRAWS)


MUTANTS = {  # file, what is broken in it, and the test that must see it: "noise" or a distribution
    "24-bit uniforms": (
        "arithmetic.h",
        "const F u = fraction(c0, c1)",
        "const F u = fraction(c0 & 0xffffff00u, c1)",
        "noise",
    ),
    "one more id under top_k": ("rows.h", "n, true, o.top_k,", "n, true, o.top_k + 1,", "top_k"),
    "one fewer id under top_p": (
        "rows.h",
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
def test_a_broken_sampler_is_caught(mutant: str, tmp_path: Path) -> None:
    """A test that passes with the source as it is fails with its noise or a threshold broken."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    file, old, new, seen_by = MUTANTS[mutant]

    def passes(root: Path, name: str) -> bool:
        (tmp_path / name).mkdir()
        library = compiled("g++", tmp_path / name, "-march=native", root=root)
        return noise_is_right(library) if seen_by == "noise" else distribution_is_right(library, seen_by)

    source = (tmp_path / "csrc" / "sampling" / file).read_text()
    assert source.count(old) == 1
    (tmp_path / "csrc" / "sampling" / file).write_text(source.replace(old, new))
    with ThreadPoolExecutor(2) as pool:
        whole, broken = pool.map(passes, (ROOT, tmp_path), ("whole", "broken"))
    assert whole and not broken
