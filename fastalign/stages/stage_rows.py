"""What a stage reads before it loads a model: the tokenized rows of train_data and eval_data."""

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from transformers import PreTrainedTokenizerBase

from ..data.readers import load_rows
from ..data.rows import Rows
from ..data.tokenization import turn_ends
from .config import TrainConfig

Row = TypeVar("Row")


class StageRows(NamedTuple, Generic[Row]):
    """The tokenized rows of a stage."""

    train: list[Row]
    held_out: list[Row]  # empty without eval_data
    ends: list[int]  # the ids that end a turn in either, for `loading.stop_at`

    @property
    def both(self) -> list[Row]:
        """The rows of train_data, then those of eval_data."""
        return [*self.train, *self.held_out]


def read_rows(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    tokenize: Callable[[Rows], list[Row]],
    *,
    generates: bool = True,
) -> StageRows[Row]:
    """The rows of train_data and eval_data by `tokenize`.

    generates: the trained model writes answers, so the ids that end a turn are looked for.
    """
    ends: list[int] = []

    def rows_of(source: str, split: str) -> list[Row]:
        loaded = load_rows(source, split=split)
        tokenized = tokenize(loaded)
        if generates:
            ends.extend(turn_ends(loaded, tokenizer))
        return tokenized

    train = rows_of(config.train_data, config.train_split)
    held_out = rows_of(config.eval_data, config.eval_split) if config.eval_data else []
    return StageRows(train, held_out, ends)
