"""What the modules share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fastalign_kernels.linear.options import HEAD_DEFAULTS, HeadSettings


class LossModule(nn.Module):
    """Keeps the options.

    Each constructor checks its options as its function does, so that a bad one fails there.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def with_defaults(
    given: Mapping[str, Any], names: type = HeadSettings, defaults: Mapping[str, Any] = HEAD_DEFAULTS
) -> dict[str, Any]:
    """The items of a TypedDict, those that were not given by default."""
    return {name: given.get(name, defaults[name]) for name in names.__annotations__}
