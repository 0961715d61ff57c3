"""The models of a PPO run besides the policy: reward model, value model and reference."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from .adapters import find_source, is_classifier, load_architecture
from .distributed import World
from .estimate import Part
from .policy_configs import PPOConfig
from .reward import zero_head
from .scorers import Classifier, Function, Reward, by_function, load_classifier


class ValueSource(NamedTuple):
    """What a separate value model starts from."""

    argument: str
    """The field of the configuration that names it."""
    folder: str
    architecture: PretrainedConfig
    scores: bool
    """Whether it is a classifier, whose head is kept."""


def parts_of(
    config: PPOConfig,
    architecture: PretrainedConfig,
    scorer: Classifier | Function,
    value: ValueSource | None,
) -> list[Part]:
    """The models that a step needs: policy, separate value model, reward model, and a copied reference."""
    parts = [Part("model", architecture)]
    if value is not None:
        parts.append(Part("value model", value.architecture, "SEQ_CLS"))
    if isinstance(scorer, Classifier):
        parts.append(Part("reward model", scorer.architecture, "SEQ_CLS", trained=False))
    if config.reference == "copy" or (config.reference == "auto" and not config.lora_rank):
        parts.append(Part("reference", architecture, trained=False))
    return parts


def micro_batch(config: PPOConfig, world: World) -> int:
    """Sequences in one forward pass on one device.

    Raises ValueError if a minibatch does not divide among all devices.
    """
    size = config.batch_size // config.minibatches
    micro = config.micro_batch_size or max(size // world.size, 1)
    if size % (micro * world.size):
        raise ValueError(
            f"batch_size / minibatches: got {config.batch_size} / {config.minibatches}, expected a multiple "
            "of "
            "micro_batch_size x devices "
            f"({micro} x {world.size})"
        )
    return micro


def make_reward(
    config: PPOConfig,
    world: World,
    scorer: Classifier | Function,
    tokenizer: PreTrainedTokenizerBase,
    attention: str,
) -> Reward:
    """The scores of completions, as configured."""
    if isinstance(scorer, Function):
        return by_function(scorer, tokenizer)
    options: dict[str, Any] = {
        "rows": micro_batch(config, world),
        "attention": attention,
        "packing": config.packing,
    }
    return load_classifier(scorer, world, tokenizer, dtype=getattr(torch, config.dtype), **options)


def find_value(config: PPOConfig, reader: Classifier | None) -> ValueSource | None:
    """The source of a separate value model; None for a shared one.

    `reader` is the reward model, if it reads the policy's tokens.
    """
    if config.value == "shared":
        return None
    usable = reader is not None and reader.labels == 1
    folder = config.value_model or (config.reward if usable else config.model)
    argument = "value_model" if config.value_model else "reward" if usable else "model"
    architecture = load_architecture(folder, task="SEQ_CLS", argument=argument)
    return ValueSource(
        argument, folder, architecture, is_classifier(find_source(folder, argument=argument), architecture)
    )


def make_value(source: ValueSource | None, load: Callable[..., Any]) -> Any:
    """The separate value model; None for a shared one."""
    if source is None:
        return None
    value = load(source.architecture, weights=source.folder, task="SEQ_CLS", argument=source.argument)
    if not source.scores:
        zero_head(value)
    return value


def make_reference(config: PPOConfig, policy: Any) -> nn.Module | None:
    """The `reference` argument of `rollout`."""
    if config.reference == "none":
        return None
    if isinstance(policy, PeftModel) and config.reference != "copy":
        return policy
    frozen: nn.Module = copy.deepcopy(policy).requires_grad_(False).eval()
    return frozen


def end_ids(policy: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a completion: the tokenizer's EOS, and those at which the model's `generate` stops."""
    configured = policy.generation_config.eos_token_id
    ids = [*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id]
    known = policy.config.get_text_config().vocab_size
    found = sorted(
        {token_id for token_id in ids if token_id is not None and token_id < known}
    )  # the model cannot draw any other id
    if not found:
        raise ValueError(
            "tokenizer: got no EOS token, and none in the model's generation_config, expected one, without "
            "which completions could not end"
        )
    return found
