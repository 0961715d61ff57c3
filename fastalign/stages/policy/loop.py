"""The steps of a stage that draws completions and learns from them in several passes."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import nn

from ...data.tokens import Prompt
from ..batches import Batch, rows_of_step
from ..loop import LossFn, run_steps, update
from ..policy_configs import PolicyConfig
from ..runs.distributed import World
from ..stage_rows import StageRows
from .rollouts import Completed
from .shared_rows import SharedRows

Metrics = dict[str, float]


class WithMetrics(Protocol):
    """What a step draws."""

    @property
    def metrics(self) -> Metrics: ...


Experience = TypeVar("Experience", bound=WithMetrics)


class Passes(NamedTuple):
    """How often and in what pieces the rows of a step are learnt from. The order is a function of (seed,
    step)."""

    epochs: int
    minibatches: int
    seed: int
    step: int


def take_passes(
    world: World,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    completed: Completed,
    passes: Passes,
    collate: Callable[[list[int]], Batch],
    loss_fn: LossFn,
    clipped: Mapping[str, Sequence[nn.Parameter]],
    max_grad_norm: float | None,
    micro_batch_size: int | None,
    precision: torch.autocast | None,
    count_items: Callable[[Batch], int],
) -> list[tuple[Metrics, int]]:
    """Take an optimizer step for each minibatch of each pass; return the metrics and items of each.

    `collate` makes a micro-batch of rows of `completed`, which are first fetched from the ranks that drew
    them.

    Raises ValueError if the rows do not divide, and FloatingPointError if a loss or a gradient is not finite,
    before the weights change.
    """
    rows = len(completed.completions)
    size = rows // passes.minibatches
    micro = micro_batch_size or max(size // world.size, 1)
    if size * passes.minibatches != rows or size % (micro * world.size):
        raise ValueError(
            f"experience: got {rows} completions, expected a multiple of minibatches x micro_batch_size x "
            f"ranks ({passes.minibatches} x {micro} x {world.size})"
        )

    def minibatches_of(rank: int) -> Iterator[list[list[int]]]:
        """The rank's micro-batches, in rows, of each minibatch of each pass."""
        for epoch in range(passes.epochs):
            order = np.random.default_rng((passes.seed, passes.step, epoch)).permutation(rows).tolist()
            for first in range(0, rows, size):
                starts = range(first + rank * micro, first + size, world.size * micro)
                yield [order[start : start + micro] for start in starts]

    for shared in (completed.completions, completed.kept):
        if isinstance(shared, SharedRows):
            shared.fetch([[*chain(*chain(*minibatches_of(rank)))] for rank in range(world.size)])
    found: list[tuple[Metrics, int]] = []
    for minibatch in minibatches_of(world.rank):
        found.append(
            update(
                world,
                model,
                optimizer,
                [collate(micro_batch) for micro_batch in minibatch],
                loss_fn,
                precision=precision or torch.autocast(world.device.type, enabled=False),
                clipped=clipped,
                max_grad_norm=max_grad_norm,
                number=len(found),
                unit=f"update of step {passes.step + 1},",
                count_items=count_items,
            )
        )
    return found


def item_means(found: Sequence[tuple[Metrics, int]]) -> Metrics:
    """The means of `take_passes`'s metrics over the items of all optimizer steps."""
    items = max(sum(number for _, number in found), 1)
    return {name: sum(numbers[name] * number for numbers, number in found) / items for name in found[0][0]}


def train_on_rollouts(
    config: PolicyConfig,
    world: World,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    prompts: StageRows[Prompt],
    *,
    draw: Callable[..., Experience],
    learn: Callable[..., Metrics],
    save: Callable[[Path], None],
    copies: int = 1,
) -> Metrics:
    """Train `model` in place, fill output_dir, and return the last line of metrics.jsonl.

    `draw(prompts, seed=, step=)` completes each prompt `copies` times, and `learn(experience, seed=, step=)`
    updates the weights; both return metrics. A rollout is a function of the weights, the seed and the step's
    number. So checkpoints lie between steps and hold no rollout.
    """

    def train_step(step: int) -> tuple[Metrics, int]:
        began = time.perf_counter()
        numbers = rows_of_step(
            step, rows=len(prompts.train), batch_size=config.batch_size // copies, seed=config.seed
        )
        noise: dict[str, Any] = {"seed": config.seed, "step": step}
        experience = draw([prompts.train[number] for number in numbers], **noise)
        drawn = time.perf_counter()
        metrics = {**experience.metrics, **learn(experience, **noise), "lr": optimizer.param_groups[0]["lr"]}
        metrics |= {"seconds_rollout": drawn - began, "seconds_update": time.perf_counter() - drawn}
        return metrics, config.batch_size

    def evaluate_held_out() -> Metrics:
        metrics = draw(prompts.held_out, seed=config.seed + 1).metrics  # other noise than that of training
        return {
            f"eval/{name}": value
            for name, value in metrics.items()
            if name.startswith(("objective/", "completions/"))
        }

    return run_steps(
        config,
        world,
        model,
        optimizer,
        train_step=train_step,
        evaluate_held_out=evaluate_held_out if prompts.held_out else None,
        save=save,
        rows=len(prompts.train) * copies,
        items_name="episode",
    )
