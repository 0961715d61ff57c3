"""What `plan_head` returns, and how it prints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class HeadBudget(NamedTuple):
    """A workspace, and the plan that it gives."""

    workspace_mib: float
    engine: str
    kept_tokens: int
    slice_columns: int
    gemms: int
    held_mib: float  # peak beyond the inputs, gradients included
    predicted_ms: float | None  # None: a card whose rates are not known


class HeadPlan(NamedTuple):
    """How a head call runs.

    For mode "general" the numbers are those of the pass that computes the gradients. On a CPU its forward
    pass runs as "no_grad".
    """

    way: str  # the mode: no_grad, gradient_in_forward, frozen_head or general
    chunk: int  # tokens whose logits are in memory together; with a screen and no_grad, whose codes are
    workspace_bytes: int  # of these logits and what is kept of them
    gemms: int  # of N x H x V, in forward and backward together
    engine: str = "token_tiles"  # or on a GPU kept_softmax, epilogue, tail, screen, *_slices
    kept_tokens: int = 0  # kept_softmax, epilogue: tokens whose dlogits or softmax are in memory together
    slice_columns: int = 0  # *_slices: ids of a slice; `chunk` is then all tokens
    held_bytes: int = 0  # on a GPU: peak beyond the inputs, gradients included
    predicted_ms: float | None = None  # on a GPU, forward and backward: a roofline, not a measurement
    budgets: tuple[HeadBudget, ...] = ()  # on a GPU: what more or less workspace_mib would buy
    codes_bytes: int = 0  # with a screen: of the weight's codes, on a CPU kept for each version of it
    screened_gemms: float = 0.0  # with a screen: `gemms` in the time of exact ones, predicted; on a GPU
    # those of 8 bits alone, beside `gemms` over the columns that matter
    coding_gemms: float = 0.0  # with a screen: coding a new version of the weight, in the time of exact ones

    def __str__(self) -> str:
        """The plan in a line; one more for a screen, and on a GPU a table of its budgets."""
        work = f"{self.way} by {self.engine}: {self.gemms} GEMMs, {self.workspace_bytes / 2**20:,.0f} MiB"
        codes = f"{self.codes_bytes / 2**20:,.0f} MiB"
        screen = f"screen: predicted time of {self.screened_gemms:.2f} exact GEMMs"
        if self.engine == "screen":
            screen += (
                f", {self.gemms} f more for the share f of columns that matter, {self.coding_gemms:.2f} for "
                f"the weight's codes, which each call makes, {codes}"
            )
        else:
            screen += (
                f", {self.coding_gemms:.2f} more for each version of the weight, whose codes take {codes}"
            )
        return "\n".join([work, *([screen] if self.codes_bytes else []), *_budget_table(self.budgets)])


def _budget_table(budgets: tuple[HeadBudget, ...]) -> Iterator[str]:
    """Lines of a table of budgets, none if there are none."""
    if not budgets:
        return
    yield "workspace_mib  engine           kept                  GEMMs  peak MiB  predicted ms"
    for budget in budgets:
        kept = f"{budget.kept_tokens:,} tokens" if budget.kept_tokens else "nothing"
        if budget.slice_columns:
            kept = f"{budget.slice_columns:,} columns"
        ms = "–" if budget.predicted_ms is None else f"{budget.predicted_ms:.3g}"
        yield (
            f"{budget.workspace_mib:13,.0f}  {budget.engine:15}  {kept:20}  {budget.gemms:5}  "
            f"{budget.held_mib:8,.0f}  {ms:>12}"
        )
