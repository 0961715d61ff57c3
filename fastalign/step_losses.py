"""The loss of each stage's step: as the stage computes it, and in plain PyTorch to compare with.

`batch` is a micro-batch as the stage makes it, `config` the stage's, `reference` what DPO and KTO hold the
policy near. The stage's loss takes a fused model; the plain one asks any model for logits and keeps them. It
has what bench and the demo use: DPO's and KTO's own losses, PPO's clip and entropy metric, without an entropy
bonus and with the KL divergence in the reward.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .stages import dpo, kto, loop, ppo, reward
from .stages.models.reference_model import Reference
from .stages.runs.distributed import World

Batch = Mapping[str, Any]
Loss = Callable[[], Tensor]


def fused_loss(stage: str, config: Any, model: Any, batch: Batch, reference: Reference | None = None) -> Loss:
    """The loss as the stage computes it."""
    device = model.device
    if stage == "kto":
        assert reference is not None
        prepare, judged = kto.with_reference(World(0, 1, device), model, reference), kto.judged_loss(config)
        rows = torch.tensor(len(batch["desirable"]), device=device)

        def with_divergence() -> Tensor:
            with torch.no_grad():
                (prepared,) = prepare([batch])
            return judged(model, prepared, rows)[0]

        return with_divergence
    if stage == "reward":
        loss_fn, items = reward.bradley_terry(config), len(batch["ends"]) // 2
    elif stage == "dpo":
        assert reference is not None
        loss_fn, items = dpo.preference_loss(config, reference), len(batch["both"]["places"]) // 2
    elif stage == "ppo":
        loss_fn, items = ppo.ppo_objective(config, config.kl_coef), len(batch["at"])
    else:
        loss_fn, items = loop.language_model_loss, loop.count_targets(batch)
    divisor = torch.tensor(items, device=device)
    return lambda: loss_fn(model, batch, divisor)[0]


def plain_loss(stage: str, config: Any, model: Any, batch: Batch, reference: Reference | None = None) -> Loss:
    """The loss of the stage from full logits, in plain PyTorch."""

    def language_model() -> Tensor:
        logits = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    def bradley_terry() -> Tensor:
        chosen, rejected = plain_scores(model, batch["both"]["arguments"], batch["ends"]).chunk(2)
        return -F.logsigmoid(chosen - rejected).mean()

    def pairs() -> Tensor:
        assert reference is not None
        chosen, rejected = (plain_logps(model, batch["both"]) - reference(batch["both"])).chunk(2)
        beta = config.loss_options.get("beta", 0.1)  # DPO's default
        return -F.logsigmoid(beta * (chosen - rejected)).mean()

    def judged() -> Tensor:
        assert reference is not None
        with torch.no_grad():
            reference_logps, mismatched = reference(batch["both"]).chunk(2)
            kl = (plain_logps(model, batch["mismatched"]) - mismatched).mean().clamp(min=0)
        above = config.beta * (plain_logps(model, batch["answered"]) - reference_logps - kl)
        weights = torch.where(batch["desirable"], config.desirable_weight, config.undesirable_weight)
        return (weights * (1 - torch.sigmoid(torch.where(batch["desirable"], above, -above)))).mean()

    def clipped() -> Tensor:
        arguments, at = dict(batch["arguments"]), batch["at"]
        tokens = F.pad(arguments.pop("labels"), (0, 1))[:, 1:].flatten()[at]
        logits = model.policy(**arguments, use_cache=False).logits.flatten(0, 1)[at] / config.temperature
        table = F.log_softmax(logits, -1)
        with torch.no_grad():
            _ = -(table.exp() * table).sum(-1).mean()  # the entropy, a metric
        ratio = (table.gather(1, tokens[:, None])[:, 0] - batch["old_logp"]).exp()
        bounded = ratio.clamp(1 - config.clip, 1 + config.clip)
        policy = -torch.minimum(ratio * batch["advantages"], bounded * batch["advantages"]).mean()
        values = plain_scores(model.value, arguments, at)
        held = batch["values"] + (values - batch["values"]).clamp(-config.value_clip, config.value_clip)
        errors = torch.maximum((values - batch["returns"]) ** 2, (held - batch["returns"]) ** 2)
        return policy + config.vf_coef * errors.mean() / 2

    losses = {
        "pretrain": language_model,
        "sft": language_model,
        "reward": bradley_terry,
        "dpo": pairs,
        "kto": judged,
        "ppo": clipped,
    }
    return losses[stage]


def plain_logps(model: Any, packed: Batch) -> Tensor:
    """`fastalign.data.sequence_logps` from full logits."""
    arguments = dict(packed["arguments"])
    labels = F.pad(arguments.pop("labels"), (0, 1), value=-100)[:, 1:]
    logp = F.log_softmax(model(**arguments, use_cache=False).logits, -1).gather(
        -1, labels.clamp(min=0)[..., None]
    )[..., 0]
    sums = torch.cat([logp.new_zeros(1), logp.masked_fill(labels < 0, 0).flatten().cumsum(0)])
    return sums[packed["starts"]].diff()[packed["places"]]


def plain_scores(model: Any, arguments: Batch, at: Tensor) -> Tensor:
    """A classifier's scores at the tokens `at` of packed sequences, [N]."""
    inputs = {name: value for name, value in arguments.items() if name != "labels"}
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
    scores: Tensor = model.score(hidden.flatten(0, 1)[at])[:, 0]
    return scores
