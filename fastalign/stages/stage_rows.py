"""What a stage reads before it loads a model: the tokenized rows of train_data and eval_data."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar, overload

from transformers import PreTrainedTokenizerBase

from ..data.readers import load_rows
from ..data.rows import Rows
from ..data.tokenization import turn_ends
from .config import TrainConfig
from .runs.distributed import World
from .token_cache import TokenCache, TokenizedRows, note_tokenizer

Row = TypeVar("Row")


class Joined(Sequence[Row]):
    """Two sequences of rows, one after the other, without a copy."""

    def __init__(self, first: Sequence[Row], second: Sequence[Row]) -> None:
        self.first, self.second = first, second

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    @overload
    def __getitem__(self, key: int) -> Row: ...
    @overload
    def __getitem__(self, key: slice) -> list[Row]: ...
    def __getitem__(self, key: int | slice) -> Row | list[Row]:
        if isinstance(key, slice):
            return [self[number] for number in range(len(self))[key]]
        number = range(len(self))[key]
        first = len(self.first)
        return self.first[number] if number < first else self.second[number - first]


class StageRows(NamedTuple, Generic[Row]):
    """The tokenized rows of a stage."""

    train: Sequence[Row]
    held_out: Sequence[Row]  # empty without eval_data
    ends: list[int]  # the ids that end a turn in either, for `loading.stop_at`

    @property
    def both(self) -> Sequence[Row]:
        """The rows of train_data, then those of eval_data."""
        return Joined(self.train, self.held_out)


def read_rows(
    config: TrainConfig,
    world: World,
    tokenizer: PreTrainedTokenizerBase,
    tokenize: partial[Any],
    *,
    generates: bool = True,
) -> StageRows[Any]:
    """The rows of train_data and eval_data by `tokenize`, a function of rows with all its options.

    Several processes, and one with cache_dir, read them from a cache that one process fills (token_cache.py).
    generates: the trained model writes answers, so the ids that end a turn are looked for.
    """

    def ends_of(loaded: Rows) -> list[int]:
        return turn_ends(loaded, tokenizer) if generates else []

    def read(field: str, source: str, split: str) -> TokenizedRows:
        try:
            if cache is not None:
                return cache.read(source, split, tokenize, ends_of)
            loaded = load_rows(source, split=split)
        except ValueError as error:  # a DataError too
            if str(error).startswith("split"):
                raise ValueError(f"{field}_{error}") from error
            raise
        return TokenizedRows(tokenize(loaded), ends_of(loaded))

    note_tokenizer(tokenizer)
    cached = (world.size > 1 or config.cache_dir is not None) and not config.dry_run
    cache = TokenCache(config, world, tokenizer) if cached else None
    train = read("train", config.train_data, config.train_split)
    held_out = TokenizedRows([], [])
    if config.eval_data:
        held_out = read("eval", config.eval_data, config.eval_split)
    return StageRows(train.rows, held_out.rows, train.ends + held_out.ends)
