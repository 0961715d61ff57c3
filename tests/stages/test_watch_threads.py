"""What the ranks tell each other, with both ranks in this process: their threads, the store, and no exit."""

import threading
import time
from collections.abc import Iterator

import pytest
from torch.distributed import DistError, TCPStore

from fastalign.faults import FAULT, RankError
from fastalign.stages.runs import rank_watch
from fastalign.stages.runs.rank_watch import Watch


class Ended(BaseException):
    """The process of a rank ends."""


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Watch, Watch, list[int]]]:
    """Two ranks that give signs of life every 20 ms, and the statuses with which they would have ended."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    for name, seconds in {"PERIOD": 0.02, "GRACE": 0.1, "SILENT": 1.0}.items():
        monkeypatch.setattr(rank_watch, name, seconds)
    ended: list[int] = []

    def end(status: int) -> None:
        ended.append(status)
        raise Ended

    monkeypatch.setattr(rank_watch.os, "_exit", end)
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    both = Watch(0, 2, minutes=0.05), Watch(1, 2, minutes=0.05)
    for rank in both:
        rank.at_step(3)
    yield (*both, ended)
    for rank in both:
        rank.close()


def wait_until(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_fault_of_a_rank_is_told_by_rank_0_which_waits_in_a_collective(ranks, capfd) -> None:
    first, second, ended = ranks
    fault = ValueError("row 7 is odd")
    assert second.end(fault) is fault
    wait_until(lambda: ended)
    assert capfd.readouterr().err == "fastalign: error: rank 1, step 3: row 7 is odd\n" and ended[0] == FAULT


def test_a_collective_that_fails_because_of_another_rank_tells_that_ranks_fault(ranks) -> None:
    first, second, _ = ranks
    second.store.set("fault", '{"rank": 1, "step": 3, "line": "row 7 is odd"}')
    told = first.end(DistError("connection closed by peer"))
    assert isinstance(told, RankError) and str(told) == "rank 1, step 3: row 7 is odd"


def test_a_collective_that_fails_because_a_rank_is_gone_names_the_rank(ranks) -> None:
    first, second, _ = ranks
    wait_until(lambda: 1 in first.seen)
    second.close()
    told = first.end(RuntimeError("[gloo] connection closed by peer"))
    assert isinstance(told, RankError) and str(told).startswith(
        "rank 1 (step 3): gives no sign of life any more"
    )


def test_a_collective_that_fails_while_all_ranks_live_tells_its_error(ranks) -> None:
    first, _, _ = ranks
    told = first.end(DistError("two\n  lines"))
    assert isinstance(told, RankError) and str(told) == "rank 0, step 3: two lines"


def test_a_rank_without_signs_of_life_for_the_timeout_is_told_and_ends_the_other(ranks, capfd) -> None:
    first, second, ended = ranks
    wait_until(lambda: 1 in first.seen)
    second.close()
    wait_until(lambda: ended)
    shown = capfd.readouterr().err
    assert shown.startswith(
        "fastalign: error: rank 1 (step 3): gives no sign of life for 0.05 minutes (timeout)"
    )
    assert ended == [FAULT]
