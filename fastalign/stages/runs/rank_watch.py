"""What ranks tell each other beside their collectives: signs of life, and the first fault.

A rank that fails while the others wait for it in a collective cannot tell them. So a thread of each
rank writes a sign of life into torchrun's store every second, and looks for a fault of another rank. The
lowest remaining rank prints the fault, and all ranks end.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ...faults import FAULT, RankError, Stopped, describe

PERIOD = 1.0  # seconds between two signs of life
GRACE = 3.0  # seconds that a rank has to end by itself after another one has failed
SILENT = 3.5  # seconds without a sign of life after which a rank counts as gone, if a collective failed


class Watch:
    """The thread of a rank, and what the ranks write for each other."""

    def __init__(self, rank: int, size: int, *, minutes: float) -> None:
        self.rank, self.size, self.seconds = rank, size, minutes * 60
        self.step, self.count = 0, 0
        self.ending = threading.Event()  # tells the thread to end
        self.leaving = threading.Event()  # the main thread ends by itself
        self.seen: dict[int, tuple[str, float]] = {}  # by rank: the last sign of life, and when it was new
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=30),
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = dist.PrefixStore(
            f"fastalign/{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{attempt}", store
        )
        self._sign()
        threading.Thread(target=self._run, daemon=True, name="fastalign-watch").start()

    def at_step(self, step: int) -> None:
        """Note the step that this rank is in, in the store too: a killed rank cannot report it."""
        self.step = step
        with suppress(Exception):  # the thread will find what is wrong with the store
            self._sign()

    def close(self) -> None:
        """Stop watching: the run is at its end."""
        self.ending.set()

    def end(self, error: BaseException) -> BaseException:
        """What this rank is to raise for `error`, which ends it; the others learn of it."""
        self.leaving.set()
        main = threading.current_thread() is threading.main_thread()
        # torchrun's, because a rank has ended, must not come between.
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN) if main else None
        try:
            return self._end(error)
        except Exception:  # the store is gone: there is nobody left to tell
            return error
        finally:
            if main:
                signal.signal(signal.SIGTERM, before)

    def _end(self, error: BaseException) -> BaseException:
        fault = None if _of_communication(error) else self._post(error)
        if self.rank == 0 and fault is not None:
            self.store.set("left", "")
            return error
        if fault is not None:
            # Rank 0 prints first: torchrun ends all ranks when one has ended
            self._wait_for("left", GRACE + 10 * PERIOD)
            time.sleep(PERIOD)
            return error
        # A collective failed because of another rank: one with a fault of its own, or one that is gone.
        posted = self._get("fault", SILENT)
        alive = list(range(self.size)) if posted else self._alive()
        line = self._describe(json.loads(posted)) if posted else self._describe_silent(alive, error)
        prints = self.rank == min(alive)
        if not prints and not self._wait_for("left", GRACE + 10 * PERIOD):
            prints = self.rank == min(self._alive())  # the rank that should have printed is gone too
        self.store.set("left", "")
        return RankError(line) if prints else error

    def _post(self, error: BaseException) -> dict[str, Any]:
        line = describe(error) or "".join(traceback.format_exception_only(error)).strip()
        if isinstance(error, Stopped):
            line = str(error)
        fault = {"rank": self.rank, "step": self.step, "line": line}
        if not isinstance(error, KeyboardInterrupt):
            self.store.compare_set("fault", "", json.dumps(fault))
        return fault

    def _describe(self, fault: dict[str, Any]) -> str:
        at = f", step {fault['step']}" if fault["step"] else ""
        return f"rank {fault['rank']}{at}: {fault['line']}"

    def _describe_silent(self, alive: list[int], error: BaseException) -> str:
        silent = sorted(set(range(self.size)) - set(alive))
        if not silent:
            return f"rank {self.rank}, step {self.step}: {' '.join(str(error).split())}"
        return (
            f"{self._names(silent)} no sign of life any more: killed, for want of memory perhaps, or "
            "stopped, or the machine is gone"
        )

    def _names(self, silent: list[int]) -> str:
        steps = {rank: self.seen[rank][0].split()[1] for rank in silent if rank in self.seen}
        named = [
            f"rank {rank} (step {steps[rank]})" if steps.get(rank, "0") != "0" else f"rank {rank}"
            for rank in silent
        ]
        return f"{', '.join(named)}: {'gives' if len(silent) == 1 else 'give'}"

    def _alive(self) -> list[int]:
        """The ranks that give signs of life; takes SILENT seconds."""
        before = self._signs()
        time.sleep(SILENT)
        after = self._signs()
        return [rank for rank in range(self.size) if rank == self.rank or before.get(rank) != after.get(rank)]

    def _signs(self) -> dict[int, str]:
        found = {rank: self._get(f"alive/{rank}", 0.1) for rank in range(self.size) if rank != self.rank}
        for rank, sign in found.items():
            if sign and self.seen.get(rank, ("", 0.0))[0] != sign:
                self.seen[rank] = (sign, time.monotonic())
        return {rank: sign for rank, sign in found.items() if sign}

    def _sign(self) -> None:
        self.count += 1
        self.store.set(f"alive/{self.rank}", f"{self.count} {self.step}")

    def _run(self) -> None:
        while not self.ending.wait(PERIOD):
            try:
                self._sign()
                posted = self._get("fault", 0.0)
                left = self.store.check(["left"])
                self._signs()
            except Exception:
                # The store is gone, and with it the process that held it: torchrun, or rank 0 without it.
                self._end_soon(None if self.rank else "the store of the ranks is gone")
                return
            if self.leaving.is_set():
                continue
            if posted or left:
                self._end_soon(self._describe(json.loads(posted)) if posted and self.rank == 0 else None)
                continue
            late = [rank for rank, (_, since) in self.seen.items() if time.monotonic() - since > self.seconds]
            if late and self.rank == min(set(range(self.size)) - set(late)):
                minutes = f"{self.seconds / 60:g} minutes (timeout)"
                self._end_soon(
                    f"{self._names(late)} no sign of life for {minutes}: stopped, or the machine is gone",
                    grace=0,
                )

    def _end_soon(self, line: str | None, grace: float = GRACE) -> None:
        """End the process soon, unless it ends by itself: it waits for a rank that will not come.

        The rank that prints a line goes first.
        """
        if self.leaving.wait(grace + (3 * PERIOD if line is None else 0)) or self.ending.is_set():
            return
        if line is not None:
            print(f"fastalign: error: {line}", file=sys.stderr, flush=True)
            with suppress(Exception):  # the store may be gone, and the other ranks with it
                self.store.set("left", "")
            time.sleep(PERIOD)
        os._exit(FAULT)

    def _get(self, key: str, seconds: float) -> str:
        """The value of a key, "" where it is not there within so many seconds."""
        return self.store.get(key).decode() if self._wait_for(key, seconds) else ""

    def _wait_for(self, key: str, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not self.store.check([key]):
            if time.monotonic() >= end:
                return False
            time.sleep(0.1)
        return True


def _of_communication(error: BaseException) -> bool:
    """Whether a collective failed because of another rank, also where torchrun's SIGTERM followed at once."""
    if isinstance(error, Stopped) and error.__context__ is not None:
        error = error.__context__
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    )
