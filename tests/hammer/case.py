"""Cases of the public functions: random shapes, dtypes, layouts, options and hostile values, each beside its
specification.

A case draws tensors and options, and is run three times: ours, the specification in the same dtype ("eager"),
and the specification in fp64 ("truth"). Outputs and gradients must be no worse than eager (tolerance.py); in
fp64 they must equal the truth to 1e-9.
"""

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.tolerance import EPS, assert_no_worse_than_eager

Random = random.Random


DTYPES = (torch.float64, torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16)


class Case(NamedTuple):
    """A call: tensors by argument (those in `trained` get gradients), options, and what it is compared with.

    Functions that mean the same for ours and the specification take (tensors, options) and give a tensor, a
    tuple or a NamedTuple.
    """

    tensors: dict[str, Tensor]
    options: dict[str, Any]
    trained: tuple[str, ...]
    ours: Callable[..., Any]
    specification: Callable[..., Any]
    ours_only: dict[str, Any] = {}  # noqa: RUF012 - options that only ours takes
    exact: bool = True  # whether gradients are those of the specification


def run(
    function: Callable[..., Any], case: Case, tensors: dict[str, Tensor], options: dict[str, Any], seed: int
) -> list[tuple[str, Tensor]]:
    """Named outputs of floating point, and the gradients for one random upstream gradient of all outputs that
    have a graph."""
    leaves = {name: x.detach().clone().requires_grad_(name in case.trained) for name, x in tensors.items()}
    result = function(**leaves, **options)
    fields = zip(result._fields, result) if hasattr(result, "_fields") else [("result", result)]
    outputs = [(name, x) for name, x in fields if isinstance(x, Tensor)]
    generator = torch.Generator().manual_seed(seed)
    total: Any = 0
    for _, x in outputs:
        if x.requires_grad:
            upstream = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            total = total + (x.double() * upstream).sum()
    found = [(name, x.detach()) for name, x in outputs]
    if isinstance(total, Tensor):
        inputs = [leaves[name] for name in case.trained]
        grads = torch.autograd.grad(total, inputs, allow_unused=True)
        found += [
            (f"d {name}", g if g is not None else torch.zeros_like(x))
            for name, x, g in zip(case.trained, inputs, grads)
        ]
    return found


def check(case: Case, seed: int) -> None:
    """Raise AssertionError where ours is worse than it may be."""
    wide = {name: x.double() if x.is_floating_point() else x for name, x in case.tensors.items()}
    options_wide = {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in case.options.items()
    }
    truth = run(case.specification, case, wide, options_wide, seed)
    eager = run(case.specification, case, case.tensors, case.options, seed)
    ours = run(case.ours, case, case.tensors, {**case.options, **case.ours_only}, seed)
    assert [name for name, _ in ours] == [name for name, _ in truth], (ours, truth)
    in_fp64 = all(x.dtype == torch.float64 for x in case.tensors.values() if x.is_floating_point())
    loud = any(not true.isfinite().all() for name, true in truth if not name.startswith("d "))
    for (name, value), (_, plain), (_, true) in zip(ours, eager, truth):
        gradient = name.startswith("d ")
        if not value.is_floating_point() or (gradient and not case.exact):
            continue  # top1 turns on ties of rounded logits
        # Where low precision overflows in the specification too, nothing can be said; nor of gradients that
        # go with a NaN that is seen.
        keep = (plain.isfinite() == true.isfinite()) & (plain.isnan() == true.isnan())
        keep &= value.isfinite() | true.isfinite()  # inf may be NaN
        if gradient and loud:
            keep &= true.isfinite() & value.isfinite()
        if gradient and value.dtype == torch.float16:  # whose small numbers have few digits
            keep &= (true.abs() >= torch.finfo(torch.float16).smallest_normal) | (true == 0)
        assert_close(value[keep], plain[keep], true[keep], name, in_fp64=in_fp64)


def assert_close(value: Tensor, plain: Tensor, true: Tensor, name: str, *, in_fp64: bool) -> None:
    if not value.numel():
        return
    if in_fp64:
        finite = true[true.isfinite()]
        largest = finite.abs().max().item() if finite.numel() else 1.0
        torch.testing.assert_close(
            value,
            true,
            rtol=1e-9,
            atol=1e-9 * largest + 1e-14,
            equal_nan=True,
            msg=lambda text: f"{name}: {text}",
        )
        return
    low = value.dtype in (torch.bfloat16, torch.float16)
    if low:  # few numbers of few digits: eager is lucky more often
        plain = true + 2 * (plain - true)
    near = (
        4 * EPS if not true.any() else 1e-14
    )  # what terms that cancel leave; the specifications have 1 - sigmoid(40) = 0
    far = ~((value - true).abs() <= near)
    if far.any():
        rounding = torch.finfo(value.dtype).eps if low else EPS
        assert_no_worse_than_eager(
            value[far], plain[far].to(value.dtype), true[far].double(), name, rounding=rounding, terms=16
        )


# Draws.


def maybe(r: Random, value: Any, otherwise: Any = None, chance: float = 0.5) -> Any:
    return value if r.random() < chance else otherwise


def log_uniform(r: Random, low: float, high: float) -> float:
    return math.exp(r.uniform(math.log(low), math.log(high)))


def size(r: Random, most: int) -> int:
    """Small sizes often, 1 among them; powers of two and their neighbours too."""
    if r.random() < 0.3:
        return min(most, max(1, 2 ** r.randrange(0, 9) + r.choice((-1, 0, 1))))
    return max(1, round(log_uniform(r, 1, most)))


def floats(r: Random, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(r.getrandbits(40))
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    if r.random() < 0.1:
        x = (x * 2).round() / 2  # ties
    return strided(r, x.to(dtype))


def whole(r: Random, high: int, shape: tuple[int, ...], low: int = 0) -> Tensor:
    x = torch.randint(low, high, shape, generator=torch.Generator().manual_seed(r.getrandbits(40)))
    return strided(r, x.to(r.choice((torch.int64, torch.int64, torch.int32))))


def truths(r: Random, shape: tuple[int, ...], share: float) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(r.getrandbits(40))) < share


def strided(r: Random, x: Tensor) -> Tensor:
    """The same values, sometimes in another layout."""
    kind = r.randrange(6)
    if kind == 0 and x.dim():
        return torch.stack([x, x], -1).flatten(-2)[..., ::2]
    if kind == 1 and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return x


def spoil(r: Random, x: Tensor, *values: float) -> Tensor:
    """One element replaced, rarely."""
    if values and x.numel() and r.random() < 0.06:
        x = x.clone()
        x[tuple(r.randrange(length) for length in x.shape)] = r.choice(values)
    return x


def lead(r: Random, most: int = 40) -> tuple[int, ...]:
    return r.choice([(size(r, most),), (size(r, 6), size(r, 8))])


# The head, from logits and from hidden states.


def transforms(r: Random, *, scaled: bool) -> dict[str, Any]:
    options: dict[str, Any] = {
        "temperature": maybe(r, log_uniform(r, 0.1, 5), 1.0),
        "softcap": maybe(r, log_uniform(r, 1, 60), None, 0.3),
    }
    if scaled:
        options["logit_scale"] = maybe(r, r.choice((-1, 1, 1)) * log_uniform(r, 0.05, 3), 1.0)
    return options


def ids_of(r: Random, V: int, shape: tuple[int, ...], options: dict[str, Any]) -> Tensor:
    """Ids, some ignored; ignore_index goes into the options, and may itself be an id."""
    ignore = r.choice((-100, -100, -1, r.randrange(V), None, 2**40))
    options["ignore_index"] = ignore
    ids = whole(r, V, shape)
    share = r.choice((0.0, 0.0, 0.3, 0.9, 1.0))
    value = -100 if ignore is None else ignore
    if value > 2**31 - 1:
        ids = ids.long()
    return torch.where(truths(r, shape, share), torch.tensor(value, dtype=ids.dtype), ids)


def loss_of_tokens(
    r: Random, shape: tuple[int, ...], dtype: torch.dtype, tensors: dict[str, Tensor]
) -> dict[str, Any]:
    options: dict[str, Any] = {
        "label_smoothing": maybe(r, r.random(), 0.0, 0.3),
        "z_loss": maybe(r, log_uniform(r, 1e-4, 1e-1), 0.0, 0.3),
    }
    options["reduction"] = r.choice(("mean", "sum", "none"))
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    if r.random() < 0.3:
        tensors["token_weights"] = floats(r, shape, accumulator).abs() + 0.1
    if options["reduction"] == "mean" and r.random() < 0.3:
        options["num_items"] = r.choice((log_uniform(r, 0.5, 100), torch.tensor(r.randint(1, 50))))
    return options
