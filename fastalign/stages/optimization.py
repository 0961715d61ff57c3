"""The optimizer, the learning rate of a step, and how a model is wrapped for several ranks."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .config import TrainConfig
from .models.sharding import by_mesh, local_part, reshard, shard
from .runs.distributed import World

# A bfloat16 number of this times a step, or more, rounds back to itself: half of its last digit is 2**-8.
_HOLDS_STILL = 2**8


def multiplier(step: int, *, schedule: str, steps: int, warmup_steps: int, final_fraction: float) -> float:
    """The learning rate of optimizer step `step` (from 0), as a fraction of the peak.

    It rises as (step + 1) / warmup_steps and is 1 right after the warm-up. It would reach final_fraction at
    step `steps`, which is the first one that is not taken.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
    fall = 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return final_fraction + (1 - final_fraction) * fall


def autocast(config: TrainConfig, world: World) -> torch.autocast:
    """The precision of every forward pass."""
    return torch.autocast(world.device.type, torch.bfloat16, enabled=config.bf16)


def make_optimizer(
    config: TrainConfig, model: nn.Module, peak_rates: Mapping[str, float] | None = None
) -> torch.optim.AdamW:
    """AdamW over the trained weights. Matrices decay; vectors (norms, biases) do not.

    `peak_rates`: from the start of a weight's name to its peak learning rate, if that is not learning_rate.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            rates = (rate for start, rate in (peak_rates or {}).items() if name.startswith(start))
            groups.setdefault((next(rates, config.learning_rate), weight.ndim >= 2), []).append(weight)
    return torch.optim.AdamW(
        [
            {"params": weights, "lr": rate, "weight_decay": config.weight_decay if decays else 0.0}
            for (rate, decays), group in sorted(groups.items(), key=lambda group: not group[0][1])
            for weights in by_mesh(group).values()  # a fused step takes tensors of one mesh
        ],
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        fused=True,
    )


def peak_rates(world: World, optimizer: torch.optim.Optimizer) -> list[float]:
    """The learning rates of the optimizer's groups, before a schedule changes them.

    Prints a warning if most weights are in bfloat16 and too large for a step of AdamW, which is about the
    learning rate, to change them.
    """
    still = trained = 0
    for group in optimizer.param_groups:
        for weight in map(local_part, group["params"]):
            trained += weight.numel()
            if weight.dtype == torch.bfloat16:
                still += int((weight.detach().abs() >= _HOLDS_STILL * group["lr"]).sum())
    if still > trained / 2:
        world.say(
            f"warning: dtype: got bfloat16 with learning_rate={optimizer.param_groups[0]['lr']:g}, expected "
            f"float32 (bf16=true computes in bfloat16): {still / trained:.0%} of the weights are so large "
            "that a step rounds to nothing"
        )
    return [group["lr"] for group in optimizer.param_groups]


def distribute(config: TrainConfig, world: World, model: nn.Module) -> nn.Module:
    """The model to call in training: compiled as configured, its gradients averaged over the ranks.

    A model whose parts are not sharded yet is sharded whole, if the world is to.
    """
    if config.compile:
        model.compile()
    if world.sharding is not None:
        reshard(shard(world.sharding, model))
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True) if world.size > 1 else model


def trained_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights that the optimizer changes."""
    return [weight for weight in model.parameters() if weight.requires_grad]


def set_rates(
    config: TrainConfig, optimizer: torch.optim.Optimizer, peaks: Sequence[float], step: int, steps: int
) -> float:
    """Set the groups' learning rates for a step of `steps`. Returns their fraction of the peaks."""
    fraction = multiplier(
        step,
        schedule=config.schedule,
        steps=steps,
        warmup_steps=config.warmup_steps,
        final_fraction=config.final_fraction,
    )
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["lr"] = peak * fraction
    return fraction
