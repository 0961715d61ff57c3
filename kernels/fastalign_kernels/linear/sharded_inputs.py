"""The head of this rank, from `group=` or from DTensors: what the ranks must agree on is checked here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import checks
from ..torch_func import assumed_constant, requires_grad, unwrapped
from .sharded import Shards
from .sharded_collectives import all_gather
from .sharded_dtensors import group_of_rows, local_rows, refuse_fsdp, replicated

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LocalHead(NamedTuple):
    """The tensors of a head call on this rank."""

    hidden: Tensor  # [..., H]
    weight: Tensor  # [V_r, H]
    bias: Tensor | None  # [V_r]
    shards: Shards | None  # None: the weight is whole
    group: str  # its name; "" if the weight is whole


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


class _Facts(NamedTuple):
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


def local_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Callable[[], Tensor], call: OfCall
) -> LocalHead:
    """The head of this rank. Without a group and without DTensors it is as given.

    The number of each rank's rows is not known here, so the first call with a weight asks the other ranks, as
    does the first with other gradients or options: one all-gather of 136 bytes, which waits for the device.
    The answer is kept for that tensor: pass the parameter itself, not a view that is made for each call. That
    call also compares the ids, and refuses a weight that FSDP2 shards. Compiled code refuses it when it is
    traced.

    Raises:
        ValueError: a group that is no process group or not initialised; a DTensor that is not sharded by rows
            over one mesh dimension, or beside tensors that are not; a weight that FSDP2 shards; ranks that
            differ in what `_Facts` names, or in the ids of a first call.
    """
    group = call.group
    if group is None and not (checks.is_dtensor(weight) or checks.is_dtensor(hidden)):
        return LocalHead(hidden, weight, bias, None, "")
    given = weight
    if checks.is_dtensor(weight):
        if torch.compiler.is_compiling() or weight not in _KNOWN:
            refuse_fsdp(weight)
        of_weight = group_of_rows("weight", weight)
        group = _same_group(of_weight, group)
        weight = local_rows(weight)
    if group is None:
        raise ValueError(
            "hidden: got a DTensor with a weight that is none, expected a plain tensor: hidden.to_local()"
        )
    process_group = _process_group(group)
    if bias is not None and checks.is_dtensor(bias) != checks.is_dtensor(given):
        raise ValueError("bias: got a DTensor beside a plain tensor, expected it sharded as weight is")
    if bias is not None and checks.is_dtensor(bias):
        _same_group(group_of_rows("bias", bias), process_group)
        bias = local_rows(bias)
    reduces_hidden = not checks.is_dtensor(hidden)
    if not reduces_hidden:
        hidden = replicated(hidden, process_group)
    name, rank, size = process_group.group_name, process_group.rank(), process_group.size()
    facts = _facts(hidden, weight, bias, call)
    rows = _rows_of_ranks(given, ids, facts, name, size)
    if checks.is_dtensor(given) and sum(rows) != given.shape[0]:
        raise ValueError(
            f"weight: got shards of {list(rows)} rows, expected {given.shape[0]} in all, as the DTensor says"
        )
    if sum(rows) == 0:
        raise ValueError("weight: got no rows on any rank of group, expected [V_r, H] on each")
    return LocalHead(hidden, weight, bias, Shards(rank, reduces_hidden, rows), name)


def _facts(hidden: Tensor, weight: Tensor, bias: Tensor | None, call: OfCall) -> _Facts:
    def needs(x: Tensor) -> int:
        return int(torch.is_grad_enabled() and requires_grad(x))

    _, options, reduction, adapter = call
    return _Facts(
        int(weight.shape[0]) if weight.dim() else 0,
        int(weight.shape[-1]) if weight.dim() else 0,
        checks.FLOATS.index(hidden.dtype) if hidden.dtype in checks.FLOATS else -1,
        needs(hidden),
        needs(weight),
        0 if bias is None else 1 + needs(bias),
        _REDUCTIONS.index(reduction),
        0 if adapter is None else 4 * int(adapter[0].shape[0]) + needs(adapter[0]) + 2 * needs(adapter[1]),
        *[int((value or 0.0) * 2**32) for value in options],
    )


def check_equal_on_ranks(shards: Shards, group: str, **given: Tensor) -> None:
    """Raise where a tensor has other values or another shape on some rank."""
    for argument, x in given.items():
        _refuse_different(argument, all_gather(_hash(x), len(shards.rows), group).tolist())


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


# Process groups.


def check_group(group: object) -> None:
    """A process group, a DeviceMesh of one dimension, or None."""
    if group is None:
        return
    if torch.distributed.is_available():
        if isinstance(group, torch.distributed.ProcessGroup):
            return
        if isinstance(group, torch.distributed.DeviceMesh):
            if group.ndim == 1:
                return
            raise ValueError(
                f"group: got a DeviceMesh of {group.ndim} dimensions {group.mesh_dim_names}, expected one "
                "dimension of it: mesh['tp']"
            )
    raise ValueError(
        f"group: got {checks.shown(group)}, expected a torch.distributed.ProcessGroup, one dimension of a "
        "DeviceMesh, or None"
    )


def _process_group(group: Any) -> ProcessGroup:
    """The process group of `group=`, which `check_group` has seen. Raises ValueError."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        raise ValueError(
            f"group: got {checks.shown(group)} before torch.distributed was initialised, expected "
            "init_process_group first"
        )
    if isinstance(group, torch.distributed.DeviceMesh):
        group = group.get_group()
    if not torch.compiler.is_compiling() and group not in torch.distributed.distributed_c10d._world.pg_map:
        raise ValueError("group: got a process group that was destroyed, expected one that is initialised")
    return group


def _same_group(found: ProcessGroup, group: Any) -> ProcessGroup:
    """The group of a DTensor, if `group` is it or None."""
    if group is not None and _process_group(group).group_name != found.group_name:
        raise ValueError("group: got another process group than the DTensor's, expected None or that group")
    return found


# What the ranks tell each other.

_KNOWN: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _rows_of_ranks(
    weight: Tensor, ids: Callable[[], Tensor], facts: _Facts, group: str, ranks: int
) -> tuple[int, ...]:
    """The rows of each rank. Raises ValueError on all ranks if they differ in another fact, or in ids."""
    if torch.compiler.is_compiling():
        return _agreed_rows(tuple(facts), (0, 0), group, ranks, weight.device.type)
    if isinstance(ids(), FakeTensor) or ids().is_meta:
        return (facts.rows,) * ranks  # no values: no rank to ask
    known = _KNOWN.setdefault(weight, {})
    if (facts, group) not in known:
        of_ids = tuple(_hash(unwrapped(ids())).tolist())
        known[facts, group] = _agreed_rows(tuple(facts), of_ids, group, ranks, weight.device.type)
    return known[facts, group]


@assumed_constant
def _agreed_rows(
    facts: tuple[int, ...], of_ids: tuple[int, ...], group: str, ranks: int, device: str
) -> tuple[int, ...]:
    """Tell the other ranks the facts of this one; compiled code asks when it is traced, where ids have no
    values."""
    with torch.no_grad():
        numbers = torch.tensor((*facts, *of_ids), dtype=torch.int64, device=device)
        told = all_gather(numbers, ranks, group).tolist()
    *of_facts, ids, number = zip(*told)
    _refuse_different("ids", list(zip(ids, number)))
    by_fact = dict(zip(_Facts._fields, of_facts))
    rows: tuple[int, ...] = by_fact.pop("rows")
    for field, values in by_fact.items():
        if len(set(values)) > 1:
            raise ValueError(
                f"{_LABELS.get(field, field)}: got {_shown(field, values)} on the ranks of group, expected "
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
    """An adapter's rank and what of it is trained, from `_Facts.lora`."""
    trained = ("nothing", "A", "B", "A and B")[value % 4]
    return f"rank {value // 4}, {trained} trained"
