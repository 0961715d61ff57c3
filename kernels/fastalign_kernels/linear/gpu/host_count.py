"""A number that a kernel writes into the host's memory, and that the host reads when it is there."""

from __future__ import annotations

import threading
from collections import deque

import torch
from torch import Tensor

from ..chunks import capturing


class _Memory:
    """Pinned int32 numbers that are used again.

    torch's allocator would hand out freed pinned memory although a kernel that it knows nothing of has yet to
    write there. Here a number is handed out again when its event says that the kernel has run.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[Tensor] = []
        self._pending: deque[tuple[torch.cuda.Event, Tensor]] = deque()

    def take(self) -> Tensor:
        with self._lock:
            while self._pending and self._pending[0][0].query():
                self._free.append(self._pending.popleft()[1])
            if self._free:
                return self._free.pop()
        return torch.empty(1, dtype=torch.int32, pin_memory=True)

    def give_back(self, memory: Tensor, event: torch.cuda.Event) -> None:
        with self._lock:
            self._pending.append((event, memory))


_MEMORY = _Memory()


class HostCount:
    """The number of tokens that are not ignored; calling it waits for what was queued before `written`.

    Under graph capture nothing can be asked, so all tokens count.
    """

    def __init__(self, order: Tensor, n_tokens: int) -> None:
        """order: a tensor on the device. n_tokens: N."""
        self.n_tokens = n_tokens
        self.captured = capturing(order)
        self.known = n_tokens == 0 or self.captured
        self._event: torch.cuda.Event | None = None
        self._pinned = order.is_cuda and not self.captured
        if self._pinned:
            self.memory = _MEMORY.take()
        else:  # under capture nobody reads it
            self.memory = torch.empty(1, dtype=torch.int32, device=order.device)

    def written(self) -> None:
        """Note that the kernel that writes `memory` [1] int32 is queued."""
        if self._pinned and self._event is None:
            self._event = torch.cuda.Event()
            self._event.record()

    def __call__(self) -> int:
        if not self.known:
            if self._pinned:
                assert self._event is not None, "HostCount: asked before the kernel that writes it was queued"
                self._event.synchronize()
            self.n_tokens, self.known = int(self.memory[0]), True
        return self.n_tokens

    def __del__(self) -> None:
        # Without an event, as after an error, a kernel may be queued or not: the memory is not used again.
        event = getattr(self, "_event", None)
        if event is not None:
            _MEMORY.give_back(self.memory, event)
