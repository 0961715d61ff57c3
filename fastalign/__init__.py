"""fastalign: fused losses for every stage of language-model training.

The functions are those of fastalign_kernels.

A name is loaded when it is first used, so that the command `fastalign` starts without torch, and `import
fastalign` without transformers. `fastalign.nn`, `fastalign.rollout` and the other modules need no import of
their own.
"""

from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from fastalign_kernels import *  # noqa: F403
    from fastalign_kernels import __all__ as _kernels

    from . import actor_critic, causal_lm, classifier, data, measure, nn, rollout, stages  # noqa: F401

    __all__ = [*_kernels, "__version__"]


def __getattr__(name: str) -> Any:
    import importlib.util

    if name.startswith("_") and name != "__all__":  # what others look for in any module must not load torch
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    _load_kernels()
    try:
        return globals()[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    import pkgutil

    modules = [module.name for module in pkgutil.iter_modules(__path__)]  # noqa: F405
    return sorted({*globals(), *__getattr__("__all__"), *modules})


def _load_kernels() -> None:
    import fastalign_kernels

    # All at once, so that torch.compile finds plain names here once one of them was used.
    globals().update({name: getattr(fastalign_kernels, name) for name in fastalign_kernels.__all__})
    globals()["__all__"] = [*fastalign_kernels.__all__, "__version__"]
