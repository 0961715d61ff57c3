"""The value model of a PPO run: what it starts from, and how it is made."""

from collections.abc import Callable
from typing import Any, NamedTuple

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ..models.adapters import find_source, is_classifier, load_architecture
from ..models.loading import load_tokenizer
from ..models.model_files import has_tokenizer
from ..policy_configs import PPOConfig
from ..reward import zero_head
from .scorers import Classifier


class ValueSource(NamedTuple):
    """What a separate value model starts from."""

    argument: str
    """The field of the configuration that names it."""
    folder: str
    architecture: PretrainedConfig
    scores: bool
    """Whether it is a classifier, whose head is kept."""


def find_value(
    config: PPOConfig, reader: Classifier | None, tokenizer: PreTrainedTokenizerBase
) -> ValueSource | None:
    """The source of a separate value model; None for a shared one.

    `reader` is the reward model, if it reads the policy's tokens, which are `tokenizer`'s.

    Raises ValueError for a value_model whose tokenizer is another one. A folder without one is taken.
    """
    if config.value == "shared":
        return None
    name = config.value_model
    if name is not None and has_tokenizer(name) and load_tokenizer(name).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"value_model: got {name!r}, whose tokenizer has other tokens than the policy's, expected a "
            "model that reads the policy's tokens"
        )
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
