"""The CUDA blocks run on the host, one thread after another: they give the bits of the CPU's rows."""

import ctypes
import math
import shutil
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from fastalign_kernels.sampling import sample
from tests.kernels.sampling_cases import OPTIONS, needs_native, same
from tests.kernels.sampling_checks import bit_masks, hostile
from tests.kernels.sampling_library import COMPILERS, compiled, job_of, needs_compiler


class Searches(ctypes.Structure):
    """Searches of sampling_emulator.cpp."""

    _fields_ = [("alone", ctypes.c_int64), ("listed", ctypes.c_int64)]


@pytest.fixture(scope="module")
def library_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ctypes.CDLL]:
    """The library by a compiler, built once."""

    @cache
    def build(compiler: str) -> ctypes.CDLL:
        if shutil.which(compiler) is None:
            pytest.skip(f"{compiler} is not installed")
        library = compiled(compiler, tmp_path_factory.mktemp("blocks"), "-DBLOCKS", "-O1")
        library.by_blocks.restype = Searches
        return library

    return build


@pytest.mark.cpu_only
@needs_native
@pytest.mark.parametrize("compiler", COMPILERS)
def test_the_cuda_block_gives_the_same_bits(library_of: Callable[[str], ctypes.CDLL], compiler: str) -> None:
    """csrc/sampling/block.h on the host, whatever the split of a row over blocks, equals
    csrc/sampling/rows.h."""
    library = library_of(compiler)
    for V, scale, dtype in [
        (1, 1.0, torch.float32),
        (300, 0.3, torch.bfloat16),
        (5003, 4.0, torch.float32),
        (5003, 1.0, torch.float16),
    ]:
        x = hostile(V, scale, dtype, "cpu")
        masks = {
            "seen": bit_masks(12, V, "cpu"),
            "repetition_penalty": 1.2,
            "allowed": bit_masks(12, V, "cpu"),
        }
        for options in [*OPTIONS.values(), masks | {"top_p": 0.9}, {"finished": torch.arange(12) % 3 == 0}]:
            ours = sample(x, seed=9, **options)
            for chunks_per_block in (1, 7, 1000):
                job, found = job_of(x, 9, **options)
                code = [torch.float32, torch.bfloat16, torch.float16].index(dtype)
                library.by_blocks(code, ctypes.byref(job), ctypes.c_int64(chunks_per_block))
                same(ours, found)


def searches(library: ctypes.CDLL, x: torch.Tensor, **options: Any) -> Searches:
    """What the searches of x's rows took, after the bits were compared with the CPU's."""
    job, found = job_of(x, 9, **options)
    code = [torch.float32, torch.bfloat16].index(x.dtype)
    taken: Searches = library.by_blocks(code, ctypes.byref(job), ctypes.c_int64(104))
    same(sample(x, seed=9, **options), found)
    return taken


@cache
def large_rows() -> dict[str, torch.Tensor]:
    V = 151936
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(1, V, generator=generator)
    few = torch.rand(1, V, generator=generator) < 0.001
    rank = torch.randperm(V, generator=generator)[None] + 1
    return {
        "trained-like": normal * 3,
        "flat": normal,
        "untrained": normal * 0.001,
        "Zipf": -1.5 * rank.log(),
        "far from 0": normal * 3 + 1e4,
        "bf16": normal.bfloat16(),
        "bf16, far from 0": (normal * 3 + 100).bfloat16(),
        "equal": torch.full((1, V), 2.5),
        "ties at every threshold": (normal * 12).round() / 4,
        "few allowed": torch.where(few, normal * 3, -math.inf),
        "masked by -1e9": torch.where(few, normal * 3, -1e9),
        "huge": normal * 1e38,
    }


@pytest.mark.cpu_only
@needs_native
@needs_compiler
@pytest.mark.parametrize("row", large_rows())
def test_no_block_searches_a_row_by_itself(library_of: Callable[[str], ctypes.CDLL], row: str) -> None:
    library = library_of("g++")
    x = large_rows()[row]
    for options in (
        {"top_p": 0.1},
        {"top_p": 0.9, "temperature": 0.7},
        {"top_p": 0.95},
        {"top_p": 0.999},
        {"top_k": 1},
        {"top_k": 50},
        {"top_k": 5000},
        {"top_k": 50, "top_p": 0.9, "min_p": 0.01},
        {"min_p": 1e-4},
    ):
        assert searches(library, x, **options).alone == 0, options


@pytest.mark.cpu_only
@needs_native
@needs_compiler
def test_the_second_launch_leaves_few_values_to_the_third(
    library_of: Callable[[str], ctypes.CDLL],
) -> None:
    """About one bucket of values. From plain counts the edges were 16 buckets apart: 199 values, 1.
    Top-p near 1 needs the mass below the threshold, whose bound is wider: 716 values."""
    library, x = library_of("g++"), large_rows()["trained-like"]
    for options, most in (({"top_p": 0.9}, 40), ({"top_k": 5000}, 40), ({"top_p": 0.999}, 1000)):
        assert 0 < searches(library, x, **options).listed <= most, options


@pytest.mark.cpu_only
@needs_native
@needs_compiler
def test_a_block_that_searches_a_row_by_itself_gives_the_same_bits(
    library_of: Callable[[str], ctypes.CDLL],
) -> None:
    """The list holds 4096 values. More lie between the edges where top_p leaves no room for rounding, and
    where top_k keeps more and top_p asks for their mass."""
    library, x = library_of("g++"), large_rows()["trained-like"]
    for options in ({"top_p": 0.9999999}, {"top_k": 9000, "top_p": 0.7}):
        assert searches(library, x, **options).alone == 1, options
