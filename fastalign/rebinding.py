"""Bound methods that a class does not have: Python pickles those by a name that it would not find again."""

from collections.abc import Callable
from typing import Any


class Rebound:
    """Pickled as a call: when it is read back, the function's result takes its place."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call
