"""What all integrations share: a check of the host, and the handle that counts calls and undoes a patch."""

import importlib
import inspect
import re
import sys
import warnings
from collections.abc import Callable, MutableMapping, Sequence
from functools import partial, wraps
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastalign_kernels import checks

from .published import Published

# What the fused head has kernels for.
DEVICES = ("cpu", "cuda")

_OPTION_CHECKS: dict[str, Callable[[Any], object]] = {
    "tail_eps": checks.tail_eps,
    "workspace_mib": partial(checks.above_zero, "workspace_mib"),
}
_ABSENT = object()
_PATCHED: dict[str, "PatchedHost"] = {}


class UnsupportedHostError(ValueError):
    """The installed host is not the one that the integration was written for. The message says how."""


def check_version(host: str, tested: Sequence[str]) -> str:
    """Return the installed version of `host`.

    Args:
        host: the name of its distribution.
        tested: the releases that the integration serves, such as "1.16"; a patch number may follow.
    Raises:
        UnsupportedHostError: another version.
        ModuleNotFoundError: the host is not installed.
    """
    try:
        installed = version(host)
    except PackageNotFoundError:
        raise ModuleNotFoundError(
            f"{host}: got no installed package, expected {' or '.join(tested)}: {_pip(host, tested)}",
            name=host,
        ) from None
    if not any(re.match(rf"{re.escape(release)}(?!\d)", installed) for release in tested):
        raise UnsupportedHostError(
            f"{host}: got version {installed}, expected {' or '.join(tested)}, tested with fastalign: "
            f"{_pip(host, tested)}"
        )
    return installed


def check_parameters(host: str, name: str, owner: Any, expected: Sequence[str]) -> Any:
    """Return what the dotted `name` finds in `owner`, a callable with the parameters `expected`, in order.

    Args:
        host: the name of its distribution.
        name: such as "Function.forward", looked up in `owner`.
        owner: a module or class of the host.
    Raises:
        UnsupportedHostError: there is no such callable, or its parameters are others.
    """
    where = getattr(owner, "__name__", owner)
    found = owner
    for part in name.split("."):
        found = getattr(found, part, _ABSENT)
        if found is _ABSENT:
            raise UnsupportedHostError(
                f"{host}: got {where} without {name}, expected {name}({', '.join(expected)})"
            )
    got = list(inspect.signature(found).parameters)
    if got != [*expected]:
        raise UnsupportedHostError(
            f"{host}: got {where}.{name}({', '.join(got)}), expected ({', '.join(expected)}): "
            f"this build of {host} {version(host)} is not the one that fastalign was tested with"
        )
    return found


def check_published(published: Published) -> None:
    """Check the installed version of a host and the parameters of its functions. Imports their modules.

    Raises:
        UnsupportedHostError: another version, or a function that is absent or has other parameters.
        ModuleNotFoundError: the host is not installed.
    """
    check_version(published.host, published.tested)
    for function in published.functions:
        module = _module_of(published.host, function.module)
        check_parameters(published.host, function.name, module, function.parameters)


def _module_of(host: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if not name.startswith(missing.name or "?"):
            raise  # a package that the host needs is not installed
        raise UnsupportedHostError(
            f"{host}: got version {version(host)} without the module {name}, expected it: this build is not "
            "the one that fastalign was tested with"
        ) from None


def unserved(hidden: Tensor, weight: Any) -> str | None:
    """Why fastalign's head cannot serve a call; None if it can."""
    if hidden.device.type not in DEVICES:
        return f"tensors on {hidden.device.type}, expected one of {', '.join(DEVICES)}"
    if hasattr(weight, "ds_id"):
        return "an lm_head sharded by DeepSpeed's ZeRO-3, expected a whole weight"
    return None


class PatchedHost:
    """What `patch()` returns. `calls` counts the host's calls of fastalign. Leaving a `with` block undoes it.

    A call inside a compiled graph is counted once, when it is traced.
    """

    def __init__(self, host: str, options: dict[str, Any] | None = None) -> None:
        self.host = host
        self.options = options or {}
        self.calls = 0
        self._undo: list[Callable[[], None]] = []
        self._warned: set[str] = set()

    @classmethod
    def current(cls, host: str, options: dict[str, Any] | None = None) -> "PatchedHost | None":
        """The handle of a host that is patched already, so that a second `patch()` changes nothing.

        Raises:
            ValueError: an option of the head out of range, or a host that was patched with other options.
        """
        for name, check in _OPTION_CHECKS.items():
            if options is not None and options.get(name) is not None:
                check(options[name])
        handle = patched(host)
        if handle is not None and handle.options != (options or {}):
            raise ValueError(
                f"patch: got {options} for {host}, expected {handle.options}, with which it is patched: "
                "call unpatch() first"
            )
        return handle

    @property
    def active(self) -> bool:
        """Whether the host is patched by this handle."""
        return _PATCHED.get(self.host) is self

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of the host until `unpatch`."""
        original = getattr(owner, name)

        def undo() -> None:
            if getattr(owner, name) is not value:
                raise ValueError(
                    f"unpatch: got another {owner.__name__}.{name}, expected fastalign's: {self.host} was "
                    "patched again by someone else; undo that first"
                )
            setattr(owner, name, original)

        setattr(owner, name, value)
        self._undo.append(undo)
        _PATCHED[self.host] = self

    def replace_function(self, owner: ModuleType, name: str, value: Any) -> None:
        """Replace a function of the host in `owner` and in each loaded module that has it by another name.

        `from owner import name` copies the reference, so the module alone is not enough. `unpatch` also gives
        back the original to modules that were imported after the patch. A reference inside an object (a
        partial, a closure, a table) keeps the function that it holds.
        """
        original = getattr(owner, name)

        def undo() -> None:
            for module, attribute in _references(value):
                setattr(module, attribute, original)

        self.on_unpatch(undo)  # runs last, when the modules below have the original again
        for module, attribute in _references(original):
            self.replace(module, attribute, value)

    def replace_item(self, mapping: MutableMapping[str, Any], key: str, value: Any) -> None:
        """Set an entry of a table of the host until `unpatch`."""
        original = mapping[key]

        def undo() -> None:
            if mapping[key] is not value:
                raise ValueError(
                    f"unpatch: got another entry {key}, expected fastalign's: {self.host} was patched again "
                    "by someone else; undo that first"
                )
            mapping[key] = original

        mapping[key] = value
        self.on_unpatch(undo)

    def warn_without_calls(
        self, owner: Any, name: str, remedy: str, *, applies: Callable[..., bool] = lambda *_: True
    ) -> None:
        """Warn once if the host's `owner.name` ends and fastalign was not called since it ended before.

        Args:
            owner, name: a function of the host that trains, or ends a step.
            remedy: what to do about it.
            applies: takes the call's arguments. False: that training has no head over the vocabulary.
        """
        original = getattr(owner, name)
        seen = self.calls

        @wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            result = original(*args, **kwargs)
            before, seen = seen, self.calls
            if self.active and seen == before and applies(*args):
                self.warn_once(
                    f"{self.host}: got 0 calls of fastalign before {owner.__name__}.{name} ended, "
                    f"expected some: the trainer did not use the fused head. {remedy}"
                )
            return result

        self.replace(owner, name, watched)

    def on_unpatch(self, undo: Callable[[], None]) -> None:
        """Call `undo` when the host is unpatched."""
        self._undo.append(undo)
        _PATCHED[self.host] = self

    def unpatch(self) -> None:
        """Give the host its functions back, the last replaced first. Does nothing the second time."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()
        if self.active:
            del _PATCHED[self.host]

    def count(self) -> None:
        """Count a call of fastalign."""
        if torch.compiler.is_compiling():
            self._count_in_trace()
        else:
            self.calls += 1

    @torch.compiler.assume_constant_result
    def _count_in_trace(self) -> None:
        """Count while a call is traced: a graph that changed `calls` would be compiled again each step."""
        self.calls += 1

    def warn_once(self, message: str) -> None:
        """Warn, unless this handle gave the same warning before."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=3)

    def warn_unserved(self, reason: str) -> None:
        """Say once that the host's own function runs, and why."""
        self.warn_once(
            f"{self.host}: got {reason}: {self.host}'s own function runs, and the fused head does nothing"
        )

    def __enter__(self) -> "PatchedHost":
        return self

    def __exit__(self, *_: object) -> None:
        self.unpatch()


def patched(host: str) -> PatchedHost | None:
    """The handle of a host that is patched now, or None."""
    return _PATCHED.get(host)


def unpatch(host: str) -> None:
    """Undo the patch of a host. Does nothing if it is not patched."""
    if host in _PATCHED:
        _PATCHED[host].unpatch()


def _references(function: Any) -> list[tuple[ModuleType, str]]:
    """The modules that are loaded and have `function`, each with its name there."""
    return [
        (module, name)
        for module in list(sys.modules.values())
        if isinstance(module, ModuleType)
        for name, value in list(vars(module).items())
        if value is function
    ]


def _pip(host: str, tested: Sequence[str]) -> str:
    return f"pip install '{host}=={tested[-1]}.*'"
