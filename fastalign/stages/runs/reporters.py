"""What a run reports: metrics.jsonl and a progress bar; on request TensorBoard, wandb or trackio."""

import dataclasses
import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from tqdm import tqdm

from ..config import TrainConfig
from .distributed import World
from .files import write_text

# Metrics beside the bar, with the items per second.
SHOWN = ("loss", "eval/loss", "objective/scores", "objective/kl")
PROGRESS_SECONDS = 30.0  # between two lines of progress if stderr is a file


class Reporter(Protocol):
    """Anything that takes the metrics of a step."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Take the metrics after `step` optimizer steps."""

    def finish(self) -> None:
        """Write out what is still buffered."""


class TensorBoard:
    """Event files under output_dir/tensorboard."""

    def __init__(self, config: TrainConfig, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what a killed run wrote after the checkpoint that this one continues from.
        self.writer = SummaryWriter(
            str(Path(config.output_dir, "tensorboard")), purge_step=step + 1 if step else None
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Add one point to each metric's curve."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        """Close the event file."""
        self.writer.close()


class Hosted:
    """wandb or trackio: both have init, log and finish with the same arguments."""

    def __init__(self, package: str, config: TrainConfig) -> None:
        self.package = importlib.import_module(package)
        name = Path(config.output_dir).resolve().name
        self.package.init(project=config.project, name=name, config=dataclasses.asdict(config))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Send the metrics."""
        self.package.log(dict(metrics), step=step)

    def finish(self) -> None:
        """End the run there."""
        self.package.finish()


def check_reporters(names: Sequence[str]) -> None:
    """Raise ValueError that names the reporters whose package is not installed."""
    # A spec without an origin is a plain folder of that name, such as the ./wandb that wandb itself leaves.
    specs = {name: importlib.util.find_spec(name) for name in names}
    absent = [name for name, spec in specs.items() if spec is None or spec.origin is None]
    if absent:
        raise ValueError(
            f"report_to: got {', '.join(absent)}, expected installed packages: pip install {' '.join(absent)}"
        )


class Report:
    """The lines of metrics.jsonl, one per step, passed on to every reporter. It is a context manager.

    If an earlier process did `step` steps (resume), lines of later steps are dropped. The run that wrote
    them ended before their checkpoint, and they will be written again.
    """

    def __init__(self, config: TrainConfig, world: World, *, step: int, steps: int) -> None:
        self.last: dict[str, Any] = {}
        self.main = world.main
        self.reporters: list[Reporter] = []
        interval = 0.2 if sys.stderr.isatty() else PROGRESS_SECONDS
        self.bar = tqdm(total=steps, initial=step, unit="step", mininterval=interval, disable=not world.main)
        if not world.main:
            return
        path = Path(config.output_dir, "metrics.jsonl")
        kept = (
            [text for text in _whole_lines(path, world) if json.loads(text)["step"] <= step] if step else []
        )
        write_text(path, "".join(kept))
        self.last = json.loads(kept[-1]) if kept else {}
        self.file = path.open("a")
        for name in config.report_to:
            self.reporters.append(
                TensorBoard(config, step) if name == "tensorboard" else Hosted(name, config)
            )

    def write(self, line: dict[str, Any]) -> None:
        """Write one step's line; `line["step"]` counts optimizer steps done."""
        self.last = line
        if not self.main:
            return
        try:
            self.file.write(json.dumps(line, allow_nan=False) + "\n")
            self.file.flush()
        except OSError as error:
            raise OSError(
                f"output_dir: got {error.strerror!r} for {self.file.name}, expected to write there"
            ) from error
        metrics = {name: value for name, value in line.items() if name != "step"}
        for reporter in self.reporters:
            reporter.log(metrics, line["step"])
        shown = [name for name in metrics if name in SHOWN or name.endswith("_per_second")]
        self.bar.set_postfix({name: f"{metrics[name]:.4g}" for name in shown}, refresh=False)
        self.bar.update(line["step"] - self.bar.n)

    def sync(self) -> None:
        """Wait until the lines are on the disk: a checkpoint must not outlive those of its steps."""
        if self.main:
            os.fsync(self.file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.bar.close()
        if self.main:
            # What a full disk did not take cannot be written now either; the error is on its way.
            with suppress(OSError) if error is not None else nullcontext():
                self.file.close()
        for reporter in self.reporters:
            reporter.finish()


def _whole_lines(path: Path, world: World) -> list[str]:
    """The lines of an earlier process.

    A kill or a power loss may leave the last line half-written. It is cut off, and that is reported.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = []
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode()
            if not text.endswith("\n") or not isinstance(json.loads(text)["step"], int):
                raise ValueError("got half a line, expected a whole one")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            if number < len(lines):
                raise ValueError(
                    f"resume: got line {number} of {path} ({error}), expected a line of metrics.jsonl: mend "
                    "it or delete it"
                ) from error
            world.say(f"resume: {path}: line {number}, the last, is not whole and is cut off: {line[:40]!r}")
            break
        whole.append(text)
    return whole
