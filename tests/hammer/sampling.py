"""Cases of `sample`: the tokens of its specification, bits that depend on nothing but the row, and the
distribution of draws."""

import math
import random
from typing import Any

import torch
from torch import Tensor

from fastalign_kernels.sampling import Sample, sample, sample_ref
from tests.hammer.case import log_uniform, maybe, size
from tests.kernels.sampling_checks import hostile, kept_mass, surprise

NUMBERS = ("logp", "log_kept", "logp_raw", "entropy")
SLACK = 2e-6  # of a threshold on probabilities: what fp32 sums of them leave open
DRAWS = 2**15


def generator_of(r: random.Random) -> torch.Generator:
    return torch.Generator().manual_seed(r.getrandbits(40))


def rows_of(r: random.Random, most: int = 6000) -> Tensor:
    """Logits [B, V], ordinary and hostile ones."""
    dtype = r.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16))
    V, B = size(r, most), size(r, 14)
    if r.random() < 0.4:
        return hostile(V, r.choice((0.3, 2.0, 10.0)), dtype, "cpu")[
            torch.randperm(12, generator=generator_of(r))[:B]
        ]
    x = torch.randn(B, V, generator=generator_of(r)) * r.choice((1e-3, 0.3, 1, 3, 3, 10, 100))
    if r.random() < 0.2:
        x = (x * 2).round() / 2
    return x.to(dtype)


def number(r: random.Random, B: int, draw: Any, dtype: torch.dtype = torch.float64) -> Any:
    """A number, or one for each row."""
    return torch.tensor([draw() for _ in range(B)], dtype=dtype) if r.random() < 0.3 else draw()


def options_of(r: random.Random, B: int, V: int) -> dict[str, Any]:
    options: dict[str, Any] = {"seed": r.getrandbits(r.choice((4, 62)))}
    if r.random() < 0.6:
        options["temperature"] = number(r, B, lambda: r.choice((0.0, 1.0, log_uniform(r, 0.05, 5))))
    if r.random() < 0.4:
        options["top_k"] = number(r, B, lambda: r.choice((0, 1, size(r, V), V, V + 5)), torch.int64)
    if r.random() < 0.5:
        options["top_p"] = number(
            r, B, lambda: r.choice((0.0, 1.0, 0.9, r.random(), 1 - log_uniform(r, 1e-4, 0.5)))
        )
    if r.random() < 0.3:
        options["min_p"] = number(r, B, lambda: r.choice((0.0, 1.0, log_uniform(r, 1e-4, 1))))
    words = -(-V // 32)
    for name in ("seen", "allowed"):
        if r.random() < 0.25:
            options[name] = torch.randint(
                -(2**31), 2**31, (B, words), generator=generator_of(r), dtype=torch.int64
            ).to(torch.int32)
    if "seen" in options:
        options["repetition_penalty"] = number(r, B, lambda: log_uniform(r, 0.2, 5))
    if r.random() < 0.5:
        options["sequence_ids"] = torch.randint(-(2**62), 2**62, (B,), generator=generator_of(r))
    if r.random() < 0.5:
        options["positions"] = torch.randint(0, 2**32, (B,), generator=generator_of(r))
    if r.random() < 0.2:
        options["finished"] = torch.rand(B, generator=generator_of(r)) < 0.3
    if r.random() < 0.3:
        options["pad_id"] = r.randrange(V)
    return options


def chosen(options: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """The options of some rows."""
    return {name: x[rows] if isinstance(x, Tensor) else x for name, x in options.items()}


def against_the_specification(r: random.Random) -> None:
    x = rows_of(r)
    B, V = x.shape
    options = options_of(r, B, V)
    ours, truth = sample(x, **options), sample_ref(x, **options)
    assert torch.equal(ours.valid, truth.valid), (ours.valid, truth.valid)
    open_rows = (ours.kept != truth.kept) | (ours.token != truth.token)
    if open_rows.any():
        # Only where an id lies within rounding of a threshold: the kept ones then lie between those of a
        # little less and a little more.
        low, high = (sample_ref(x, **options | loosened(options, sign)) for sign in (-1, 1))
        near = (low.kept <= ours.kept) & (ours.kept <= high.kept) & (low.kept < high.kept)
        wrong = open_rows & ~near
        assert not wrong.any(), f"rows {wrong.nonzero()[:, 0].tolist()}: {ours} and {truth}"
    for name in NUMBERS:
        value, true = (getattr(result, name)[~open_rows] for result in (ours, truth))
        raw = x.double()[~open_rows]
        size_of = (
            torch.where(raw.isfinite(), raw, 0).abs().amax(-1).float() if raw.numel() else torch.zeros(0)
        )
        coldest = options.get("temperature", 1.0)
        coldest = (
            coldest[~open_rows] if isinstance(coldest, Tensor) else torch.tensor(coldest).expand(len(value))
        )
        scale = size_of * options_scale(options) / torch.where(coldest > 0, coldest, 1).clamp(max=1)
        allowed = 1e-6 * true.abs() + 4e-6 + 2e-7 * scale
        assert torch.equal(value.isnan(), true.isnan()), name
        bad = (value - true).abs() > allowed
        assert not bad.any(), f"{name}: {value[bad]} and {true[bad]}"


def options_scale(options: dict[str, Any]) -> float:
    penalty = options.get("repetition_penalty", 1.0)
    penalties = penalty.tolist() if isinstance(penalty, Tensor) else [penalty]
    return max(max(value, 1 / value) for value in penalties)


def loosened(options: dict[str, Any], sign: int) -> dict[str, Any]:
    """Thresholds that keep a little more, or less."""
    changed = {}
    for name, direction in (("top_p", 1), ("min_p", -1)):
        if name in options:
            value = torch.as_tensor(options[name], dtype=torch.float64)
            moved = value + sign * SLACK if name == "top_p" else value * (1 + direction * sign * 10 * SLACK)
            # 0 and 1 are exact: the first id alone, and no filter.
            changed[name] = torch.where((value == 0) | (value == 1), value, moved.clamp(0, 1))
    return changed


def same(ours: Sample, other: Sample, rows: Tensor) -> None:
    for name, value, theirs in zip(ours._fields[:7], ours[:7], other[:7]):
        theirs = theirs[rows]
        equal = (value == theirs) | ((value != value) & (theirs != theirs))
        assert equal.all(), (
            f"{name} of row {int(rows[(~equal).nonzero()[0, 0]])} depends on more than the row: "
            f"{value} and {theirs}"
        )


def on_the_row_alone(r: random.Random) -> None:
    """Not on the batch, the slot, the threads, the strides or the dtype that holds the same values."""
    x = rows_of(r, 20000)
    B, V = x.shape
    options = options_of(r, B, V)
    options.setdefault("sequence_ids", torch.arange(B))
    whole = sample(x, **options)
    some = torch.randperm(B, generator=generator_of(r))[: r.randint(1, B)]
    torch.set_num_threads(r.choice((1, 2, 3)))
    same(sample(x[some], **chosen(options, some)), whole, some)
    apart = torch.full((2 * B, V + r.randrange(50)), math.nan, dtype=x.dtype)
    apart[::2, :V] = x
    everything = torch.arange(B)
    same(sample(apart[::2, :V], **options), whole, everything)
    same(sample(x.float(), **options), whole, everything)


def distribution(r: random.Random) -> None:
    """A deviate above 6 comes once in 10^9 cases by chance; cells that expect next to nothing make it low."""
    V = r.randint(2, 700)
    x = torch.randn(V, generator=generator_of(r)) * r.choice((0.3, 1, 3))
    options: dict[str, Any] = {"temperature": maybe(r, log_uniform(r, 0.3, 3), 1.0)}
    options |= r.choice(({}, {"top_k": r.randint(2, V)}, {"top_p": r.uniform(0.2, 0.99)}))
    mass = kept_mass(x, **options)
    keys = torch.arange(DRAWS) + r.randrange(2**60)
    name = r.choice(("sequence_ids", "positions"))
    keys = keys % 2**32 if name == "positions" else keys
    numbers: dict[str, Any] = {"sequence_ids": torch.zeros(DRAWS, dtype=torch.int64)} | {name: keys}
    drawn = sample(x.expand(DRAWS, -1), seed=r.getrandbits(62), **numbers, **options)
    counts = torch.bincount(drawn.token, minlength=V)
    assert counts[mass == 0].sum() == 0, "an id that is not kept was drawn"
    cells = {
        number if value >= 10 else round(2 * math.log(value)) - 1000
        for number, value in enumerate((mass * DRAWS).tolist())
        if value > 0
    }
    if len(cells) > 2:
        deviate = surprise(counts, mass)
        assert deviate < 6, f"{deviate:.1f} standard deviations"


KINDS = {
    "specification": against_the_specification,
    "row alone": on_the_row_alone,
    "distribution": distribution,
}


def fuzz(r: random.Random) -> str:
    """One case; its name."""
    (kind,) = r.choices(list(KINDS), weights=(10, 6, 1))
    torch.set_num_threads(r.choice((1, 1, 2)))
    KINDS[kind](r)
    return kind
