"""fastalign inside other trainers: a module for each host, loaded when it is first used.

Importing this package imports no host.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import axolotl, llamafactory, openrlhf, torch, transformers, trl, verl  # noqa: F401


def __getattr__(name: str) -> Any:
    import importlib.util

    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    import pkgutil

    return sorted({*globals(), *(module.name for module in pkgutil.iter_modules(__path__))})
