"""What the modules share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fastalign_kernels.linear.options import HEAD_DEFAULTS, HeadSettings


class LossModule(nn.Module):
    """Keeps the options, which are also attributes, as those of torch's loss modules.

    Each constructor checks its options as its function does, so that a bad one fails there. An option that is
    set later is checked in the same way.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def __getattr__(self, name: str) -> Any:
        options = self.__dict__.get("options", {})
        return options[name] if name in options else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        options = self.__dict__.get("options", {})
        if name not in options:
            super().__setattr__(name, value)
            return
        kind = next(base for base in type(self).__mro__ if base.__module__.startswith(__package__))
        changed = vars(kind(**{**options, name: value}))
        self.__dict__.update({key: changed[key] for key in changed.keys() - vars(nn.Module()).keys()})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def with_defaults(
    given: Mapping[str, Any], names: type = HeadSettings, defaults: Mapping[str, Any] = HEAD_DEFAULTS
) -> dict[str, Any]:
    """The items of a TypedDict, those that were not given by default."""
    return {name: given.get(name, defaults[name]) for name in names.__annotations__}
