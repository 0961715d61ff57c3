"""Counts that threads share, and the count that a kernel writes into the host's memory."""

import sys
import threading

import pytest
import torch

from fastalign_kernels import kept_share, screen_counts
from fastalign_kernels.linear.counts import Counter
from fastalign_kernels.linear.gpu.host_count import HostCount
from fastalign_kernels.linear.tail_columns import ColumnCounts


def test_what_threads_add_and_take_is_counted_once() -> None:
    counter, taken = Counter(ColumnCounts()), []
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def work() -> None:
        for number in range(2000):
            counter.add(ColumnCounts(1, 3))
            if number % 4 == 0:
                taken.append(counter.take())

    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    taken.append(counter.take())
    assert [sum(column) for column in zip(*taken)] == [8000, 24000]
    assert counter.counts == ColumnCounts()


def test_compiled_code_may_ask_for_the_counts() -> None:
    @torch.compile(backend="eager", fullgraph=True)
    def ask(x: torch.Tensor) -> torch.Tensor:
        kept_share()
        screen_counts()
        return x + 1

    assert ask(torch.zeros(())) == 1


def test_a_count_is_not_read_before_its_kernel_is_queued() -> None:
    count = HostCount(torch.empty(3, dtype=torch.int32), 2)
    count._pinned = True  # as on a GPU
    with pytest.raises(AssertionError, match="asked before the kernel that writes it was queued"):
        count()
