"""Which tokens enter the GEMMs of a GPU engine, without a wait of the host in the hot path."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...softmax.tile_rows_triton import Rows
from ..chunks import capturing, on_host


class Tokens:
    """The tokens of a call that are not ignored, at positions 0 .. count - 1.

    On a GPU the count is on its way to the host: until `settle`, position p is the p-th token of an order in
    which the tokens that are not ignored come first, and `count` is N. Settle after the first tile is queued:
    the host then waits for work that was queued before, and the device never idles. If no token is ignored
    nothing is gathered. Under graph capture nothing can be asked, so all tokens enter, ignored ones as zeros.

    `order` [N + 1] int64 is what a backward pass needs to find the same positions: the tokens, then their
    count, or N + 1 if the forward pass was captured.
    """

    def __init__(self, factors: tuple[Tensor, ...], ids: Tensor, order: Tensor | None = None) -> None:
        """factors: hidden states [N, H], and U [N, r] of a LoRA adapter. order: of the forward pass, if that
        has saved it."""
        self.factors, self.ids = factors, ids
        self.count = ids.shape[0]
        self.indices: Tensor | None = None
        self._counted: Callable[[], list[int]] | None = None
        if capturing(ids):
            if order is None:
                order = torch.arange(self.count + 1, device=ids.device)
                order[-1:] = self.count + 1
                self.factors = self._masked()
            else:
                self.indices = order[:-1]
                self.factors = self._selected(self._masked(), self.indices)
        else:
            if order is None:
                kept = ids >= 0
                order = torch.cat([torch.argsort(~kept, stable=True), kept.sum().view(1)])
            self.indices, self._counted = order[:-1], on_host(order[-1:])
            if not ids.is_cuda:
                self.settle()
        self.order = order

    @property
    def settled(self) -> bool:
        """Whether the count is known."""
        return self._counted is None

    def settle(self) -> None:
        """Wait for the count of tokens that are not ignored, and drop the rest."""
        if self._counted is None:
            return
        N, (self.count,) = self.count, self._counted()
        self._counted = None
        assert self.indices is not None
        if self.count > N:  # the forward pass was captured
            self.count, self.indices, self.factors = N, None, self._masked()
        elif self.count == N:
            self.indices = None
        else:
            self.indices = self.indices[: self.count]
            self.factors = self._selected(self.factors, self.indices)

    def rows(self, begin: int, end: int) -> Rows:
        """The tokens at these positions, as the row kernels take them."""
        return Rows(None if self.indices is None else self.indices[begin:end], begin)

    def index(self, begin: int, end: int) -> Tensor | slice:
        """The tokens at these positions."""
        return slice(begin, end) if self.indices is None else self.indices[begin:end]

    def states(self, begin: int, end: int) -> tuple[Tensor, ...]:
        """Hidden states of the tokens at these positions: [end - begin, H], and [end - begin, r] of LoRA."""
        if self._counted is None:
            return tuple(x[begin:end] for x in self.factors)
        assert self.indices is not None
        index = self.indices[begin:end]
        # an ignored token's gradient is 0, but 0 times a NaN hidden state would reach dW
        ignored = (self.ids[index] < 0)[:, None]
        return tuple(x.masked_fill(ignored, 0) for x in self._selected(self.factors, index))

    def _masked(self) -> tuple[Tensor, ...]:
        ignored = (self.ids < 0)[:, None]
        return tuple(x.masked_fill(ignored, 0) for x in self.factors)

    @staticmethod
    def _selected(factors: tuple[Tensor, ...], index: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.index_select(0, index) for x in factors)
