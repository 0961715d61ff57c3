"""Sums of numbers over all calls of this process, in all its threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Generic, TypeVar

import torch

Counts = TypeVar("Counts", bound=tuple[Any, ...])


class Counter(Generic[Counts]):
    """Adds up NamedTuples of numbers."""

    def __init__(self, zero: Counts) -> None:
        self.zero = self.counts = zero
        self._lock = threading.Lock()

    def _held(self) -> AbstractContextManager[Any]:
        """The lock; nothing while Dynamo traces, which knows no lock and runs in one thread."""
        return nullcontext() if torch.compiler.is_compiling() else self._lock

    def add(self, counts: Counts) -> None:
        with self._held():
            self.counts = type(counts)(*(a + b for a, b in zip(self.counts, counts)))

    def take(self) -> Counts:
        """The sums since the last call; resets them."""
        with self._held():
            counts, self.counts = self.counts, self.zero
        return counts

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Discard what the body counts, and what other threads count meanwhile."""
        before = self.take()
        try:
            yield
        finally:
            with self._held():
                self.counts = before
