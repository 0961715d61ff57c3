"""The training loop of every stage.

The stage gives micro-batches and a loss. The loop steps, evaluates, reports and resumes.

The objective of a step is a sum over its items (trained tokens, or pairs), divided once by the number of
items in the whole step, over micro-batches and ranks. So eight micro-batches of one row and one of eight
give the same step, and so do one rank and two.

A step is a function of its number, the seed and the weights; nothing else carries over. So these, the
optimizer's state and the random states are all that a checkpoint needs for a run to continue bitwise (on a
GPU: as far as its kernels are deterministic).
"""

import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastalign_kernels.ordered_sum import ordered_sum

from ..faults import Stopped
from ..finite import find_not_finite
from .batches import Batch, micro_batch_size, total_steps
from .config import TrainConfig, save_config
from .head_counts import head_counts, reset_counts
from .models.hub_names import check_names
from .models.loading import check_liger, check_screen
from .models.saving import save_model
from .models.sharding import accumulating, clip_gradients, local_part, plan_sharding, reshard
from .optimization import autocast, distribute, make_optimizer, peak_rates, set_rates, trained_weights
from .runs import checkpoint
from .runs.distributed import World, join_world
from .runs.reporters import Report, check_reporters
from .runs.run_folder import check_room, held, naming
from .runs.signals import Signals, how_to_resume

# (model, micro-batch, items in the step [int64 scalar]) -> the micro-batch's share of the loss, with
# gradient, and of each metric. Shares are summed over micro-batches and ranks.
LossFn = Callable[[nn.Module, Batch, Tensor], tuple[Tensor, dict[str, Tensor]]]
# This rank's micro-batches of a step, or of an evaluation -> the same with what each must know of all of
# them, without gradient.
Prepare = Callable[[Sequence[Batch]], Sequence[Batch]]


@contextmanager
def start(config: TrainConfig) -> Iterator[World]:
    """Join the other ranks, and refuse what cannot run here.

    Raises ValueError for an absent model, reporter, device or Liger; a screen without 8-bit products; a mesh
    that does not fit the ranks; a batch_size that the devices do not divide; or an output_dir that another
    run holds, or that already holds a run (resume=true continues it).
    """
    check_reporters(config.report_to)
    check_names(config)
    with join_world(config.device, config.timeout) as world, _held(config, world):
        check_liger(config, world)
        check_screen(config, world)
        world = replace(world, sharding=plan_sharding(config, world.size, world.device))
        rows = micro_batch_size(config, world) * world.dp_size
        if config.batch_size % rows:
            raise ValueError(
                f"batch_size: got {config.batch_size}, expected a multiple of micro_batch_size x devices "
                f"({micro_batch_size(config, world)} x {world.dp_size})"
            )
        if not config.resume and Path(config.output_dir, "metrics.jsonl").exists():
            raise ValueError(
                f"output_dir: got {config.output_dir!r}, which holds a run, expected a new folder: continue "
                "the run with resume=true or name another folder"
            )
        _check_free(config)
        yield world


def _check_free(config: TrainConfig) -> None:
    """Refuse an output_dir in which the run would overwrite other models."""
    if Path(config.output_dir, "metrics.jsonl").exists():
        return
    for folder in (Path(config.output_dir, part) for part in ("model", "value")):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            what = "files in" if folder.is_dir() else "a file"
            raise ValueError(
                f"output_dir: got {what} {str(folder)!r} that no run left and this run would replace, "
                "expected a new folder"
            )


def _held(config: TrainConfig, world: World) -> AbstractContextManager[None]:
    return held("output_dir", Path(config.output_dir)) if world.main and not config.dry_run else nullcontext()


def count_targets(batch: Batch) -> int:
    """Trained tokens of a micro-batch: labels other than -100; a causal LM predicts none in column 0."""
    return int((batch["labels"][:, 1:] != -100).sum())


def language_model_loss(model: nn.Module, batch: Batch, items: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """NLL (nats per token), token accuracy and the model's entropy (nats), over the trained tokens."""
    output = model(**batch, num_items_in_batch=items, use_cache=False)
    sums = {
        "nll": -ordered_sum(output.logp),
        "accuracy": output.top1.sum(),
        "entropy": ordered_sum(output.entropy),
    }
    return output.loss, {name: total / items for name, total in sums.items()}


def train(
    config: TrainConfig,
    world: World,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: int,
    batches_of: Callable[[int], list[Batch]],
    loss_fn: LossFn,
    held_out: Sequence[Batch] = (),
    count_items: Callable[[Batch], int] = count_targets,
    items_name: str = "tokens",
    prepare: Prepare = lambda batches: batches,
) -> dict[str, float]:
    """Train `model` in place, fill output_dir, and return the last line of metrics.jsonl.

    `batches_of(step)` gives this rank's micro-batches of a step (from 0). `rows` is the number of rows in
    an epoch. `items_name` is what metrics.jsonl calls the items that `count_items` counts. Raises
    FloatingPointError if the loss or the gradient is not finite, before the weights change.
    """
    wrapped = distribute(config, world, model)
    optimizer = make_optimizer(config, model)
    precision = autocast(config, world)
    trained = trained_weights(model)

    def train_step(step: int) -> tuple[dict[str, float], int]:
        return update(
            world,
            wrapped,
            optimizer,
            batches_of(step),
            loss_fn,
            precision=precision,
            clipped={"grad_norm": trained},
            max_grad_norm=config.max_grad_norm,
            count_items=count_items,
            prepare=prepare,
            number=step,
        )

    def evaluate_held_out() -> dict[str, float]:
        return evaluate(config, world, model, held_out, loss_fn, count_items, prepare)

    return run_steps(
        config,
        world,
        model,
        optimizer,
        train_step=train_step,
        evaluate_held_out=evaluate_held_out if held_out else None,
        save=partial(save_model, world, model, tokenizer),
        rows=rows,
        items_name=items_name,
    )


def run_steps(
    config: TrainConfig,
    world: World,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    train_step: Callable[[int], tuple[dict[str, float], int]],
    evaluate_held_out: Callable[[], dict[str, float]] | None,
    save: Callable[[Path], None],
    rows: int,
    items_name: str,
) -> dict[str, float]:
    """Take the remaining steps of the run, and return the last line of metrics.jsonl.

    `train_step(step)` updates the weights and returns the step's metrics and items.
    `evaluate_held_out()` returns the held-out metrics. `save(output_dir)`, which all ranks call, saves the
    models there. Learning rates start from those of the optimizer's groups.

    Raises Stopped, a KeyboardInterrupt, after Ctrl-C or SIGTERM on any rank, once the step is done and its
    checkpoint is saved.
    """
    steps = total_steps(config, rows)
    peaks = peak_rates(world, optimizer)
    random.seed(config.seed + world.dp_rank)
    torch.manual_seed(config.seed + world.dp_rank)
    checkpoints = checkpoint.Checkpoints(config, world, model, optimizer)
    done, items_done = _resume(config, world, checkpoints, rows)
    if done >= steps:
        world.say(
            f"resume: got a run of {done} steps, expected fewer than the {steps} of max_steps or epochs: "
            "nothing is left to train"
        )
    output_dir = Path(config.output_dir)
    if world.main:
        output_dir.mkdir(parents=True, exist_ok=True)
        save_config(config, output_dir / "config.yaml")
        _check_room(config, model, steps - done)

    model.train()
    with Signals(world) as signals, Report(config, world, step=done, steps=steps) as report, checkpoints:
        if evaluate_held_out and not done:
            line = {"step": 0} | evaluate_held_out()
            _check_metrics(line, model, 0)
            report.write(line)
        go_on = f"go on with: {how_to_resume(config, world)}"
        if number := signals.agreed():
            raise Stopped(number, f" after step {done}, before the next; {go_on}")
        for step in range(done, steps):
            began = time.perf_counter()
            world.at_step(step + 1)
            fraction = set_rates(config, optimizer, peaks, step, steps)
            reset_counts()  # of earlier runs and of the evaluation before
            metrics, items = train_step(step)
            items_done += items
            seconds = time.perf_counter() - began

            line = {"step": step + 1, "epoch": (step + 1) * config.batch_size / rows, **metrics}
            line |= head_counts()
            line |= {"learning_rate": config.learning_rate * fraction, items_name: items_done}
            line |= {"seconds": seconds, f"{items_name}_per_second": items / seconds}
            if evaluate_held_out and _due(step + 1, config.eval_every, steps):
                line |= evaluate_held_out()
                _check_metrics(line, model, step + 1)
            report.write(line)
            number = signals.agreed() if step + 1 < steps else 0  # the last step ends the run anyway
            if number or config.save_every and _due(step + 1, config.save_every, steps):
                _check_weights(model, step + 1)
                report.sync()
                checkpoints.save(step=step + 1, rows=rows, tokens=items_done)
            checkpoints.finish(wait=False)
            if number:
                raise Stopped(number, f" after step {step + 1}, which is saved; {go_on}")
        _check_weights(model, steps)
        with naming(output_dir, _bytes_trained(model), "the model"):
            save(output_dir)
        world.barrier()
    return report.last


def _check_weights(model: nn.Module, step: int) -> None:
    """Raise FloatingPointError that names a trained weight or a buffer with NaN or inf after `step` steps."""
    trained = (
        (name, local_part(weight)) for name, weight in model.named_parameters() if weight.requires_grad
    )
    if wrong := find_not_finite(itertools.chain(trained, model.named_buffers())):
        raise FloatingPointError(
            f"step {step}: got weights of which {wrong}, expected finite numbers; neither a checkpoint nor a "
            "model of this step is saved, and those before it stay"
        )


def _check_metrics(line: Mapping[str, float], model: nn.Module, step: int) -> None:
    """Raise FloatingPointError if a metric after `step` steps is not finite.

    It names the weights if they are the cause.
    """
    if wrong := [f"{name} = {value}" for name, value in line.items() if not math.isfinite(value)]:
        _check_weights(model, step)
        raise FloatingPointError(f"step {step}: got {', '.join(wrong)}, expected finite numbers")


def _bytes_trained(model: nn.Module) -> int:
    return sum(weight.nbytes for weight in trained_weights(model))


def _check_room(config: TrainConfig, model: nn.Module, steps: int) -> None:
    """Refuse, before the first step, a run whose checkpoints and model would not fit on the disk.

    `steps` are the steps that are left.
    """
    saves = math.ceil(steps / config.save_every) if config.save_every else 0
    # The oldest checkpoint is deleted after the newest is written.
    more = max(min(saves, config.keep_checkpoints + 1) - checkpoint.count(config.output_dir), min(saves, 1))
    needed = more * checkpoint.size(model) + _bytes_trained(model)
    check_room(Path(config.output_dir), needed, f"{more} checkpoints and the model" if more else "the model")


def update(
    world: World,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    loss_fn: LossFn,
    *,
    precision: torch.autocast,
    clipped: Mapping[str, Sequence[nn.Parameter]],
    max_grad_norm: float | None,
    number: int,
    unit: str = "step",
    count_items: Callable[[Batch], int] = count_targets,
    prepare: Prepare = lambda batches: batches,
) -> tuple[dict[str, float], int]:
    """Take one optimizer step over the micro-batches of all ranks; return its metrics and number of items.

    The metrics include the loss.

    The gradients of each list in `clipped` are scaled down to max_grad_norm. Their norm before that is the
    metric of that name. If one of all these numbers is not finite, raises FloatingPointError that names the
    step, or other `unit`, of this `number` (from 0); the weights are then unchanged.
    """
    metrics, items = _totals(precision, world, model, batches, loss_fn, count_items, prepare)
    for name, weights in clipped.items():
        metrics[name] = clip_gradients(weights, max_grad_norm or math.inf)
    wrong = [f"{name} = {value}" for name, value in metrics.items() if not math.isfinite(value)]
    if wrong:
        raise FloatingPointError(
            f"{unit} {number + 1}: got {', '.join(wrong)}, expected finite numbers; the weights are still "
            f"those of {unit} {number}"
        )
    optimizer.step()
    optimizer.zero_grad()
    return metrics, items


def evaluate(
    config: TrainConfig,
    world: World,
    model: nn.Module,
    held_out: Sequence[Batch],
    loss_fn: LossFn,
    count_items: Callable[[Batch], int] = count_targets,
    prepare: Prepare = lambda batches: batches,
) -> dict[str, float]:
    """Loss and metrics over the held-out batches of all ranks, as eval/…; with nll, also its perplexity."""
    model.eval()
    with torch.no_grad():
        metrics, _ = _totals(autocast(config, world), world, model, held_out, loss_fn, count_items, prepare)
    reshard(model)
    model.train()
    if "nll" in metrics:
        metrics["perplexity"] = math.exp(min(metrics["nll"], 700.0))
    return {f"eval/{name}": value for name, value in metrics.items()}


def _totals(
    precision: torch.autocast,
    world: World,
    model: nn.Module,
    batches: Sequence[Batch],
    loss_fn: LossFn,
    count_items: Callable[[Batch], int],
    prepare: Prepare,
) -> tuple[dict[str, float], int]:
    """Forward, and backward if gradients are on; return loss and metrics over all ranks, and their items."""
    items = world.count(sum(count_items(batch) for batch in batches))
    # A tensor, because torch.compile would compile again when a number changes.
    divisor = torch.tensor(items, device=world.device)
    with torch.no_grad(), precision:
        batches = prepare(batches)
    totals: dict[str, Tensor] = {}
    for number, batch in enumerate(batches, 1):
        with accumulating(model, last=number == len(batches)):
            with precision:
                loss, metrics = loss_fn(model, world.place(batch), divisor)
            if torch.is_grad_enabled():
                # DistributedDataParallel and FSDP2 average over the ranks, but these shares must be summed.
                torch.autograd.backward(loss * world.dp_size)
        for name, share in {"loss": loss, **metrics}.items():
            totals[name] = totals.get(name, 0.0) + share.detach().double()
    return dict(zip(totals, world.sum(list(totals.values())), strict=True)), items


def _resume(
    config: TrainConfig, world: World, checkpoints: checkpoint.Checkpoints, rows: int
) -> tuple[int, int]:
    """Steps and tokens done by an earlier process, whose state is restored; (0, 0) if there is none."""
    state = checkpoints.load_latest(rows=rows) if config.resume else None
    if state is None:
        if config.resume:
            world.say(f"resume: no checkpoint in {config.output_dir}, starting at step 0")
        return 0, 0
    return state["step"], state["tokens"]


def _due(step: int, interval: int | None, steps: int) -> bool:
    return step == steps or (interval is not None and step % interval == 0)
