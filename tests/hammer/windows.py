"""The moments of a run at which it may be killed: each touch of a file below its output_dir, and each step's
parts.

Python announces every open, rename and removal to audit hooks, so no window is missed that a change of
fastalign opens. What is not announced (fsync, files that torch and safetensors write by themselves) and the
parts of a step are functions that are wrapped here.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

from fastalign.stages import grpo, loop, ppo
from fastalign.stages.models import reference_model
from fastalign.stages.runs import checkpoint, checkpoint_storage, reporters

AUDITED = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
REWRITE = "rewrite of metrics.jsonl"
# Windows by name, and how the names of the moments that belong to them begin.
AIMED: dict[str, tuple[str, ...]] = {
    REWRITE: ("open metrics", "os.rename metrics", "os.remove metrics", "os.truncate metrics"),
    "checkpoint": ("os.mkdir checkpoints", "open checkpoints", "write_hashes", "Checkpoints.save"),
    "rename of a checkpoint": ("os.rename checkpoints", "os.remove checkpoints", "os.rmdir checkpoints"),
    "fsync": ("os.fsync",),
    "reference": ("save_file", "os.rename reference", "open reference"),
    "between rollout and update": ("ppo_step", "grpo_step"),
    "line of metrics.jsonl": ("Report.write",),
    "final model": ("save_pretrained", "open model", "open value", "os.rename model"),
}


class Moments:
    """Counts the moments of this process, and ends it by SIGKILL at one of them."""

    def __init__(
        self,
        output_dir: str,
        matches: Callable[[str], bool] | None = None,
        number: int = 0,
        *,
        torn: bool = False,
    ) -> None:
        """Kill at the `number`-th moment (from 1) whose name `matches`, with what is being written emptied
        or halved where `torn`."""
        self.output_dir = os.path.realpath(output_dir)
        self.matches = matches
        self.left = number
        self.torn = torn
        self.seen: list[str] = []

    def reach(self, name: str, tear: Callable[[], None] | None = None) -> None:
        """A moment has come."""
        self.seen.append(name)
        if self.matches is not None and self.matches(name):
            self.left -= 1
            if self.left == 0:
                if self.torn and tear is not None:
                    tear()
                os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> None:
        """Begin; it cannot be ended, as audit hooks cannot be removed."""
        sys.addaudithook(self._audit)
        wrap = self._wrap
        wrap(os, "fsync")
        wrap(checkpoint_storage, "write_hashes", after=True, tear=lambda folder, path, *rest: _halve(path))
        wrap(reference_model, "save_file", after=True, tear=lambda tensors, path, *rest: _halve(path))
        wrap(reporters.Report, "write", after=True, tear=self._tear_line)
        wrap(checkpoint.Checkpoints, "save", name="Checkpoints.save", after=True)
        wrap(loop, "update", after=True)
        wrap(ppo, "ppo_step", after=True)
        wrap(grpo, "grpo_step", after=True)
        wrap(transformers.PreTrainedModel, "save_pretrained", after=True)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in AUDITED or not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return
        if event == "open" and not _writes(arguments):
            return
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if path.startswith(self.output_dir + os.sep):
            part = Path(path).relative_to(self.output_dir).parts[0]
            empties = event == "open" and _empties(arguments) and os.path.exists(path)
            self.reach(f"{event} {part}", (lambda: os.truncate(path, 0)) if empties else None)

    def _wrap(
        self,
        owner: Any,
        attribute: str,
        *,
        name: str | None = None,
        after: bool = False,
        tear: Callable[..., None] | None = None,
    ) -> None:
        function = getattr(owner, attribute)
        label = name or (f"{owner.__name__}.{attribute}" if owner in (os, reporters.Report) else attribute)

        def watched(*arguments: Any, **options: Any) -> Any:
            self.reach(f"{label}, before")
            result = function(*arguments, **options)
            if after:
                self.reach(f"{label}, after", None if tear is None else lambda: tear(*arguments))
            return result

        setattr(owner, attribute, watched)

    def _tear_line(self, reporter: reporters.Report, *rest: Any) -> None:
        path = Path(self.output_dir, "metrics.jsonl")
        text = path.read_bytes()
        last = text.rstrip(b"\n").rfind(b"\n") + 1
        os.truncate(path, (last + len(text)) // 2)


def _writes(arguments: tuple[Any, ...]) -> bool:
    mode, flags = arguments[1], arguments[2]
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return bool(isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def _empties(arguments: tuple[Any, ...]) -> bool:
    mode, flags = arguments[1], arguments[2]
    return "w" in mode if isinstance(mode, str) else bool(flags & os.O_TRUNC)


def _halve(path: Any) -> None:
    """What a kill in the middle of a write leaves."""
    if isinstance(path, (str, os.PathLike)) and os.path.exists(path):
        os.truncate(path, os.path.getsize(path) // 2)
