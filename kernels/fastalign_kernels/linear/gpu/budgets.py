"""What more or less workspace buys a head call on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from ..head_plan import HeadBudget, HeadPlan
from .plan import GRANULE, GpuCall
from .work import gpu_work, milliseconds, rates_of

SHARES = (1, 2, 4, 8, 16)  # of the default workspace


class Card(NamedTuple):
    """What a plan depends on of a GPU."""

    architecture: int  # compute capability; 0: not known
    bytes: int | None  # of memory; None: not known


def card_of(device: torch.device | str, architecture: int | None, memory_mib: float | None) -> Card:
    """The card that the arguments of `plan_head` name."""
    memory = None if memory_mib is None else int(memory_mib * 2**20)
    if (architecture is None or memory is None) and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.device(device))
        architecture = 10 * properties.major + properties.minor if architecture is None else architecture
        memory = properties.total_memory if memory is None else memory
    return Card(architecture or 0, memory)


def gpu_budgets(
    plan: HeadPlan, call: GpuCall, card: Card, plan_of: Callable[[GpuCall], HeadPlan | None]
) -> HeadPlan:
    """The plan with its memory, its predicted time and its budgets."""
    found: dict[tuple[object, ...], HeadBudget] = {}
    for mib in _workspaces(call):
        other = plan_of(call._replace(workspace_mib=mib, saved_mib=None))
        if other is not None:
            # of two workspaces with the same sizes the smaller one stands for both
            found[other[:7]] = _budget(other, call, card, mib)
    budget = _budget(plan, call, card, call.workspace_mib)
    return plan._replace(
        held_bytes=round(budget.held_mib * 2**20),
        predicted_ms=budget.predicted_ms,
        budgets=tuple(sorted(found.values(), key=lambda budget: -budget.workspace_mib)),
    )


def _budget(plan: HeadPlan, call: GpuCall, card: Card, workspace_mib: float) -> HeadBudget:
    work = gpu_work(plan, call)
    rates = rates_of(card.architecture, None if card.bytes is None else card.bytes / 2**20)
    ms = None if rates is None else milliseconds(work, call, rates)
    return HeadBudget(
        workspace_mib,
        plan.engine,
        plan.kept_tokens,
        plan.slice_columns,
        plan.gemms,
        work.held_bytes / 2**20,
        ms,
    )


def _workspaces(call: GpuCall) -> Iterator[float]:
    """MiB, the largest first: enough to keep all tokens, the call's, and shares of that."""
    if call.grad:
        tokens = GRANULE + call.n_tokens * (not call.kept_bytes)
        everything = call.n_tokens * call.kept_bytes + tokens * call.tile_bytes
        yield everything * call.vocab_size / 2**20 + 1
    for share in SHARES:
        yield call.workspace_mib / share
