"""A callback of transformers' Trainer that warns if a training ended without one call of fastalign."""

from collections.abc import Sequence
from typing import Any

import transformers.trainer
from transformers import TrainerCallback

from .hosts import PatchedHost


class WarnIfUnused(TrainerCallback):
    """Warn at the end of a training that should have called fastalign and did not."""

    def __init__(self, handle: PatchedHost, configs: Sequence[str], remedy: str = "") -> None:
        self.handle = handle
        self.configs = frozenset(configs)
        self.remedy = remedy
        self.before = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Remember how many calls there were."""
        self.before = self.handle.calls

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Warn if no call was counted since on_train_begin."""
        kinds = {kind.__name__ for kind in type(args).__mro__}
        if self.handle.active and self.handle.calls == self.before and kinds & self.configs:
            self.handle.warn_once(
                f"{self.handle.host}: got 0 calls of fastalign in a training with {type(args).__name__}, "
                f"expected some: the trainer did not use the fused head{self.remedy}"
            )


def warn_if_unused(handle: PatchedHost, configs: Sequence[str], remedy: str = "") -> None:
    """Give every Trainer that is made from now on, until `handle` is undone, a `WarnIfUnused`.

    Args:
        handle: whose calls to look at.
        configs: names of the classes of arguments whose trainers should call the fused head.
        remedy: what to do about it, appended to the warning.
    """
    callback = WarnIfUnused(handle, configs, remedy)
    transformers.trainer.DEFAULT_CALLBACKS.append(callback)
    handle.on_unpatch(lambda: transformers.trainer.DEFAULT_CALLBACKS.remove(callback))
