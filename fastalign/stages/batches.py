"""Which rows a step trains on, and how they are divided among micro-batches and ranks."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .config import TrainConfig
from .runs.distributed import World

Batch = Mapping[str, Any]
Row = TypeVar("Row")


def micro_batch_size(config: TrainConfig, world: World) -> int:
    """Rows of one forward pass on one device."""
    return config.micro_batch_size or max(config.batch_size // world.dp_size, 1)


def total_steps(config: TrainConfig, rows: int) -> int:
    """Optimizer steps of the run: max_steps, or what the epochs need, rounded up.

    Raises ValueError for a warm-up of more steps.
    """
    steps = config.max_steps or math.ceil((config.epochs or 1) * rows / config.batch_size)
    if config.warmup_steps > steps:
        raise ValueError(
            f"warmup_steps: got {config.warmup_steps}, expected at most the {steps} steps of the run"
        )
    return steps


@lru_cache(maxsize=2)
def _order(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(rows)


def rows_of_step(step: int, *, rows: int, batch_size: int, seed: int) -> list[int]:
    """The row numbers of a step: a window on the orders of all epochs, one after another.

    The order of an epoch is a function of (seed, epoch), so the step alone is the position in the data.
    Each row occurs once per epoch. A step at an epoch's end takes its remaining rows from the next epoch.
    """
    places = range(step * batch_size, (step + 1) * batch_size)
    return [int(_order(rows, seed, place // rows)[place % rows]) for place in places]


def epoch_batches(
    rows: Sequence[Row],
    collate: Callable[[Sequence[Row]], Batch],
    config: TrainConfig,
    world: World,
    arrange: Callable[[list[Row], int], list[Row]] = lambda rows, step: rows,
) -> Callable[[int], list[Batch]]:
    """A function from a step to this rank's micro-batches in it, for stages that iterate over a list of rows.

    `arrange` sees all rows of a step before they are divided among micro-batches and ranks.
    """
    size = micro_batch_size(config, world)

    def batches_of(step: int) -> list[Batch]:
        numbers = rows_of_step(step, rows=len(rows), batch_size=config.batch_size, seed=config.seed)
        arranged = arrange([rows[number] for number in numbers], step)
        starts = range(world.dp_rank * size, len(arranged), world.dp_size * size)
        return [collate(arranged[first : first + size]) for first in starts]

    return batches_of


def sequences_to_score(
    held_out: Sequence[Batch], batches_of: Callable[[int], list[Batch]], steps: Sequence[int]
) -> Iterator[Any]:
    """What a reference scores: the sequences ("both") of the held-out batches, then of each step's."""
    for batches in chain([held_out], map(batches_of, steps)):
        for batch in batches:
            yield batch["both"]


def held_out_batches(
    rows: Sequence[Row], collate: Callable[[Sequence[Row]], Batch], config: TrainConfig, world: World
) -> list[Batch]:
    """This rank's held-out rows in micro-batches. Raises ValueError if a rank would get none.

    Ranks of a sharded model gather its weights together, so each makes as many forward passes as the first:
    those with fewer rows end with empty micro-batches.
    """
    if 0 < len(rows) < world.dp_size:
        raise ValueError(
            f"eval_data: got {len(rows)} rows for {world.dp_size} devices, expected at least one for each"
        )
    local = rows[world.dp_rank :: world.dp_size]
    size = micro_batch_size(config, world)
    most = len(local) if world.sharding is None else len(rows[:: world.dp_size])
    return [collate(local[first : first + size]) for first in range(0, most, size)]
