"""Ctrl-C and SIGTERM during training: the step is finished and saved, and the user learns how to continue."""

import os
import shlex
import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from ...faults import Stopped
from ..config import TrainConfig
from ..stage_configs import CONFIGS
from .distributed import World

# torchrun forwards to its ranks the Ctrl-C that the terminal has sent them already. Within these seconds it
# is the same one.
SAME = 2.0


class Signals:
    """Notes Ctrl-C and SIGTERM while it is entered. A second Ctrl-C ends the process at once.

    Outside of the main thread, in which Python handles no signals, it notes none.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.number = 0
        self.came = 0.0
        self.before: dict[int, Any] = {}

    def agreed(self) -> int:
        """The signal that came on any rank, 0 where none did; the same on all ranks."""
        return self.world.max(self.number)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self.before = {
                number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGINT and time.monotonic() - self.came > SAME:
            raise Stopped(
                number, " at once, the second time; what was trained since the last checkpoint is lost"
            )
        if not self.number:
            self.number, self.came = number, time.monotonic()
            if self.world.main:
                # Not print: a signal may come while stderr is being written.
                os.write(
                    2,
                    (
                        f"\n{signal.Signals(number).name}: this step is finished and saved first; "
                        "Ctrl-C ends at once\n"
                    ).encode(),
                )


def how_to_resume(config: TrainConfig, world: World) -> str:
    """The command that continues the run."""
    stage = next((name for name, kind in CONFIGS.items() if isinstance(config, kind)), "STAGE")
    saved = shlex.quote(str(Path(config.output_dir, "config.yaml")))
    local = os.environ.get("LOCAL_WORLD_SIZE", str(world.size))
    start = (
        f"fastalign {stage}"
        if world.size == 1
        else f"torchrun --nproc-per-node {local} -m fastalign.stages.{stage}"
    )
    return f"{start} --config {saved} resume=true"
