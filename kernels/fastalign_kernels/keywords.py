"""Keywords that several functions share: written once, in a TypedDict, and shown in each signature."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_args, get_type_hints

Function = TypeVar("Function", bound=Callable[..., Any])


def flat_signature(defaults: Mapping[str, Any], *documentation: str | None) -> Callable[[Function], Function]:
    """A decorator of functions with `**name: Unpack[SomeTypedDict]`, which shows the items as keywords.

    help() and inspect.signature then show a flat signature, as type checkers do. The function itself is
    returned, so a call has no frame more.

    Args:
        defaults: of the items; None for those that it does not name.
        documentation: docstrings of the TypedDict and its bases. What follows their first paragraphs
            replaces the line that begins with `**name` in the function's docstring.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        *parameters, variadic = signature.parameters.values()
        (typed_dict,) = get_args(get_type_hints(function)[variadic.name])
        for name, hint in typed_dict.__annotations__.items():
            parameter = inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=defaults.get(name),
                annotation=hint.__forward_arg__,
            )
            parameters.append(parameter)
        function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        if function.__doc__:
            items = "\n".join(inspect.cleandoc(text).split("\n\n", 1)[1] for text in documentation if text)
            line = re.compile(rf"^( *)\*\*{variadic.name}.*$", re.MULTILINE)
            function.__doc__ = line.sub(lambda found: textwrap.indent(items, found[1]), function.__doc__)
        return function

    return decorate


def refuse_unknown(function: Callable[..., Any], given: Mapping[str, Any], known: frozenset[str]) -> None:
    """Python's own TypeError, which `**given` would otherwise hide."""
    for name in given:
        if name not in known:
            raise TypeError(f"{function.__qualname__}() got an unexpected keyword argument {name!r}")


def pick(given: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    """The items of these names."""
    return {name: given[name] for name in given if name in names}
