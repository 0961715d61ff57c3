"""What the ranks of a sharded head must agree on, and how they tell each other.

A call's numbers are compared before its first GEMM: facts and options, which decide the collectives, and in a
first call the ids and some rows of the weight. Compiled code has no values when it is traced, so its first
run compares those.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import checks
from ..namespace import NAMESPACE
from ..torch_func import assumed_constant, requires_grad, unwrapped
from .sharded import Shards
from .sharded_collectives import all_gather


class OfLoss(NamedTuple):
    """What ranks must also have the same of a loss; the defaults are those of a call without it."""

    reduction: str = "none"
    label_smoothing: float = 0.0
    z_loss: float = 0.0


class OfCall(NamedTuple):
    """What else of a call matters here."""

    group: Any  # as given
    options: tuple[float | None, ...]  # the first of HeadOptions, then of OfLoss, as `_OPTIONS` names them
    reduction: str
    adapter: tuple[Tensor, Tensor] | None  # A [r, H] and B [V_r, r] of `lora=`


class Facts(NamedTuple):
    """What each rank tells the others of a weight; all but `rows` must be equal."""

    rows: int
    hidden_size: int
    dtype: int  # its place in checks.FLOATS
    hidden_grad: int
    weight_grad: int
    bias: int  # 0: none, 1: without a gradient, 2: with one
    reduction: int  # its place in _REDUCTIONS; "none" takes other collectives
    lora: int  # 0: none; else 4 r, + 1 if A needs a gradient, + 2 if B does
    # options, by 2^32: another plan of the chunks would be another number of collectives
    logit_scale: int
    softcap: int
    temperature: int
    workspace_mib: int
    tail_eps: int
    label_smoothing: int
    z_loss: int


_REDUCTIONS = ("none", "mean", "sum")
_LABELS = {
    "hidden_size": "weight.shape[1]",
    "dtype": "hidden.dtype",
    "hidden_grad": "hidden.requires_grad",
    "weight_grad": "weight.requires_grad",
}
_OPTIONS = ("logit_scale", "softcap", "temperature", "workspace_mib", "tail_eps", "label_smoothing", "z_loss")


def facts_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, call: OfCall) -> Facts:
    def needs(x: Tensor) -> int:
        return int(torch.is_grad_enabled() and requires_grad(x))

    _, options, reduction, adapter = call
    return Facts(
        _constant(weight.shape[0]) if weight.dim() else 0,
        _constant(weight.shape[-1]) if weight.dim() else 0,
        checks.FLOATS.index(hidden.dtype) if hidden.dtype in checks.FLOATS else -1,
        needs(hidden),
        needs(weight),
        0 if bias is None else 1 + needs(bias),
        _REDUCTIONS.index(reduction),
        0
        if adapter is None
        else 4 * _constant(adapter[0].shape[0]) + needs(adapter[0]) + 2 * needs(adapter[1]),
        *[_constant(int((value or 0.0) * 2**32)) for value in options],
    )


def _constant(number: int) -> int:
    """The number, which compiled code then does not vary: the ranks are asked for it when it is traced."""
    return range(number).stop


KNOWN: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def rows_of_ranks(
    given: Tensor, weight: Tensor, ids: Callable[[], Tensor], facts: Facts, group: str, ranks: int
) -> tuple[int, ...]:
    """The rows of each rank. given: the tensor of which `weight` has this rank's rows.

    Raises ValueError on all ranks if they differ in another fact or in ids, or do not differ in the weight.
    """
    if torch.compiler.is_compiling():
        return _agreed_rows(tuple(facts), (), group, ranks, given.device.type)
    if isinstance(ids(), FakeTensor) or ids().is_meta:
        return (facts.rows,) * ranks  # no values: no rank to ask
    known = KNOWN.setdefault(given, {})
    key = facts, group, _members(group)
    if key not in known:
        values = tuple(_hashes(unwrapped(ids()), unwrapped(weight)).tolist())
        known[key] = _agreed_rows(tuple(facts), values, group, ranks, given.device.type)
    return known[key]


def _members(group: str) -> tuple[int, ...]:
    """The ranks of a group: one that was destroyed leaves its name to the next."""
    of_name = torch.distributed.distributed_c10d._resolve_process_group(cast(Any, group))
    return tuple(torch.distributed.get_process_group_ranks(of_name))


@assumed_constant
def _agreed_rows(
    facts: tuple[int, ...], values: tuple[int, ...], group: str, ranks: int, device: str
) -> tuple[int, ...]:
    """Tell the other ranks the facts of this one, and `_hashes`; compiled code asks when it is traced, where
    there are no values."""
    with torch.no_grad():
        numbers = torch.tensor((*facts, *values), dtype=torch.int64, device=device)
        told = all_gather(numbers, ranks, group).tolist()
    if values:
        _refuse_values([numbers[len(facts) :] for numbers in told])
    by_fact = dict(zip(Facts._fields, zip(*told)))
    rows: tuple[int, ...] = by_fact.pop("rows")
    for field, of_ranks in by_fact.items():
        if len(set(of_ranks)) > 1:
            raise ValueError(
                f"{_LABELS.get(field, field)}: got {_shown(field, of_ranks)} on the ranks of group, expected "
                "the same on all of them"
            )
    return rows


def _shown(field: str, values: tuple[int, ...]) -> list[object]:
    if field == "dtype":
        return [checks.FLOATS[value] for value in values]
    if field == "bias":
        return [("none", "one without a gradient", "one with a gradient")[value] for value in values]
    if field == "reduction":
        return [_REDUCTIONS[value] for value in values]
    if field == "lora":
        return [_adapter(value) if value else "none" for value in values]
    if field in _OPTIONS:
        return [value / 2**32 for value in values]
    return [bool(value) if field.endswith("grad") else value for value in values]


def _adapter(value: int) -> str:
    """An adapter's rank and what of it is trained, from `Facts.lora`."""
    trained = ("nothing", "A", "B", "A and B")[value % 4]
    return f"rank {value // 4}, {trained} trained"


# Values.


def compared_ids(
    ids: Tensor, weight: Tensor, checked: Mapping[str, Tensor], shards: Shards, group: str
) -> Tensor:
    """The ids, after `checked` was compared: what `check=True` compares in each call, by `_CHECKED`'s names.

    Compiled code compares them in its graph, whose first run also compares the ids and rows of the weight.

    Raises ValueError as `rows_of_ranks` does, or where a tensor has other values on some rank.
    """
    ranks = len(shards.rows)
    if torch.compiler.is_compiling():
        tensors = [x.detach() for x in checked.values()]
        return _compare(ids, weight.detach(), tensors, _next_graph(), ranks, group)
    if checks.readable(ids, True):
        _refuse_unequal(checked.values(), ranks, group)
    return ids


_CHECKED = ("ids", "hidden", "lora's A")
_graphs = itertools.count()
_COMPARED: set[int] = set()


@assumed_constant
def _next_graph() -> int:
    return next(_graphs)


@torch.library.custom_op(f"{NAMESPACE}::compare_on_ranks", mutates_args=())
def _compare(
    ids: Tensor, weight: Tensor, checked: Sequence[Tensor], graph: int, ranks: int, group: str
) -> Tensor:
    """A copy of the ids [N]; an op must return a new tensor, and one without a result would not run."""
    if graph not in _COMPARED:
        _refuse_values(all_gather(_hashes(ids, weight), ranks, group).tolist())
        _COMPARED.add(graph)
    _refuse_unequal(checked, ranks, group)
    return ids.clone()


@_compare.register_fake
def _(ids: Tensor, weight: Tensor, checked: Sequence[Tensor], graph: int, ranks: int, group: str) -> Tensor:
    return torch.empty_like(ids)


def _hashes(ids: Tensor, weight: Tensor) -> Tensor:
    """What `_refuse_values` reads of a rank: [4] int64."""
    return torch.cat([_hash(ids), _hash_of_rows(weight)])


def _hash_of_rows(weight: Tensor) -> Tensor:
    """The `_hash` of the first, the middle and the last row; 0 without rows, or if all numbers are the same:
    shards of a head that was initialised with zeros are equal."""
    if weight.dim() != 2 or weight.dtype not in checks.FLOATS or weight.numel() == 0:
        return torch.zeros(2, dtype=torch.int64, device=weight.device)
    rows = torch.stack([weight[0], weight[weight.shape[0] // 2], weight[-1]])
    return torch.where((rows == rows[0, 0]).all(), 0, _hash(rows))


def _refuse_values(of_ranks: Sequence[Sequence[int]]) -> None:
    """Raise where ranks have other ids, or all of them the same rows; of_ranks: their `_hashes`."""
    _refuse_different("ids", [values[:2] for values in of_ranks])
    rows = [values[2:] for values in of_ranks]
    if len(rows) > 1 and rows[0][1] and rows.count(rows[0]) == len(rows):
        raise ValueError(
            "weight: got the same rows on all ranks of group, expected other rows on each; without group= "
            "each rank has the whole weight"
        )


def _refuse_unequal(checked: Iterable[Tensor], ranks: int, group: str) -> None:
    """Raise where a tensor, in the order of `_CHECKED`, has other values or another shape on some rank."""
    for argument, x in zip(_CHECKED, checked):
        _refuse_different(argument, all_gather(_hash(x), ranks, group).tolist())


def _refuse_different(argument: str, of_ranks: Sequence[object]) -> None:
    different = [rank for rank, value in enumerate(of_ranks) if value != of_ranks[0]]
    if different:
        raise ValueError(
            f"{argument}: got other values on ranks {different} of group than on rank 0, expected the same "
            "on all of them"
        )


def _hash(x: Tensor) -> Tensor:
    """A number [2] int64 that depends on all bits of x, on their order, and on x's shape."""
    x = x.detach().contiguous()
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    bits = x.view(integers).reshape(-1).long()
    places = torch.arange(bits.numel(), device=x.device)
    return torch.stack([(bits * (2 * places + 1)).sum(), torch.as_tensor(bits.numel(), device=x.device)])
