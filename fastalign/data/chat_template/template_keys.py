"""Which keys of a message a chat template reads, found in its source.

A key that the template does not read would be lost silently.
"""

import re
from collections.abc import Iterable

import jinja2
from jinja2 import nodes

_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
# Filters from messages to a message, from messages to messages, and those whose arguments name a key.
_OF_ONE = ("first", "last", "random")
_OF_ALL = ("list", "reverse", "selectattr", "rejectattr", "select", "reject", "sort", "unique")
_BY_KEY = ("selectattr", "rejectattr", "map", "sort", "groupby", "unique", "sum", "min", "max")


class TemplateKeys:
    """What the template `source` reads.

    It follows `messages` through loops, slices, assignments, namespaces and macros.

    A name that is a message in one place counts as one everywhere. A message that goes whole into an
    output, a filter or an unknown function counts as read in every key. So a key may count as read that is
    not. The opposite error needs a template that unpacks messages into several names, which is not
    followed.
    """

    def __init__(self, source: str) -> None:
        self._keys: set[str] = set()
        self._all = False
        # Names, and attributes of namespaces as "name.attribute".
        self._kinds: dict[str, str] = {"messages": "list"}
        self._names: frozenset[str] = frozenset()
        try:
            tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
                _GENERATION.sub("", source)
            )
        except (jinja2.TemplateError, RecursionError):
            self._all = True  # rendering it says what is wrong
            return
        # jinja2.meta would compile it, and compute its constants: 9 ** (9 ** 9) takes for ever here.
        self._names = frozenset(name.name for name in tree.find_all(nodes.Name))
        self._macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
        known = 0
        while known < len(self._kinds):
            known = len(self._kinds)
            for node in tree.find_all((nodes.Assign, nodes.For, nodes.Call)):
                self._follow(node)
        for node in tree.find_all(nodes.Node):
            self._read(node)

    def reads(self, key: str) -> bool:
        """Whether the template may read this key of a message."""
        return self._all or key in self._keys

    def uses(self, name: str) -> bool:
        """Whether the template may read this variable from outside, such as tools."""
        return not self._names or name in self._names

    def _kind(self, node: nodes.Node | None) -> str | None:
        """Whether an expression is a "list" of messages or a "message"."""
        if isinstance(node, nodes.Name):
            return self._kinds.get(node.name)
        if isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name):
            if node.node.name == "loop" and node.attr in ("previtem", "nextitem"):
                return "message"
            return self._kinds.get(f"{node.node.name}.{node.attr}")
        if isinstance(node, nodes.Getitem) and self._kind(node.node) == "list":
            return "list" if isinstance(node.arg, nodes.Slice) else "message"
        if isinstance(node, nodes.Filter) and self._kind(node.node) == "list":
            return "message" if node.name in _OF_ONE else "list" if node.name in _OF_ALL else None
        if isinstance(node, nodes.CondExpr):
            return self._kind(node.expr1) or self._kind(node.expr2)
        if isinstance(node, nodes.And | nodes.Or | nodes.Add):
            return self._kind(node.left) or self._kind(node.right)
        if isinstance(node, nodes.List):
            return "list" if any(self._kind(item) == "message" for item in node.items) else None
        return None

    def _follow(self, node: nodes.Node) -> None:
        """Note the names that get a message or messages."""
        if (
            isinstance(node, nodes.For)
            and isinstance(node.target, nodes.Name)
            and self._kind(node.iter) == "list"
        ):
            self._kinds[node.target.name] = "message"
        elif isinstance(node, nodes.Assign):
            target, value = node.target, node.node
            name = (
                f"{target.name}.{target.attr}"
                if isinstance(target, nodes.NSRef)
                else getattr(target, "name", None)
            )
            if name and (kind := self._kind(value)):
                self._kinds[name] = kind
            elif (
                name
                and isinstance(value, nodes.Call)
                and isinstance(value.node, nodes.Name)
                and value.node.name == "namespace"
            ):
                self._bind((f"{name}.{keyword.key}", keyword.value) for keyword in value.kwargs)
        elif (
            isinstance(node, nodes.Call)
            and isinstance(node.node, nodes.Name)
            and node.node.name in self._macros
        ):
            parameters = [parameter.name for parameter in self._macros[node.node.name].args]
            self._bind(
                [*zip(parameters, node.args), *((keyword.key, keyword.value) for keyword in node.kwargs)]
            )

    def _bind(self, pairs: Iterable[tuple[str, nodes.Node]]) -> None:
        for name, value in pairs:
            if kind := self._kind(value):
                self._kinds[name] = kind

    def _read(self, node: nodes.Node) -> None:
        """Note the keys that an expression reads of a message, or that it takes one whole."""
        if isinstance(node, nodes.Getattr) and self._kind(node.node) == "message":
            if node.attr in ("items", "keys", "values"):
                self._all = True
            self._keys.add(node.attr)
        elif isinstance(node, nodes.Getitem) and self._kind(node.node) == "message":
            self._note([node.arg])
        elif isinstance(node, nodes.Compare) and any(
            self._kind(operand.expr) == "message" for operand in node.ops
        ):
            self._note([node.expr])
        elif isinstance(node, nodes.Filter):
            if self._kind(node.node) == "list" and node.name in _BY_KEY:
                named = [*node.args, *(keyword.value for keyword in node.kwargs)]
                self._keys |= {
                    part
                    for arg in named
                    if isinstance(arg, nodes.Const)
                    for part in str(arg.value).split(".")
                }
            self._all |= self._kind(node.node) == "message" or (
                self._kind(node.node) == "list" and node.name in ("tojson", "string")
            )
        elif isinstance(node, nodes.Call):
            if (
                isinstance(node.node, nodes.Getattr)
                and self._kind(node.node.node) == "message"
                and node.node.attr == "get"
            ):
                self._note(node.args[:1])
            known = isinstance(node.node, nodes.Name) and node.node.name in (*self._macros, "namespace")
            self._all |= not known and any(
                self._kind(arg) for arg in [*node.args, *(keyword.value for keyword in node.kwargs)]
            )
        elif isinstance(node, nodes.Output | nodes.Concat):
            self._all |= any(self._kind(part) for part in node.nodes)
        elif isinstance(node, nodes.For):
            self._all |= self._kind(node.iter) == "message"

    def _note(self, keys: list[nodes.Expr]) -> None:
        for key in keys:
            if isinstance(key, nodes.Const):
                self._keys.add(str(key.value))
            else:
                self._all = True
