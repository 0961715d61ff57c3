"""YAML and JSON of a configuration, read without losing or changing a value."""

import json
import re
from collections.abc import Hashable
from typing import Any

import yaml

_FLOAT = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but 1e-6 is a number, as in YAML 1.2 and in JSON, and a key twice is refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        known = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge" or not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in known:
                raise _twice(key.value, f" (line {key.start_mark.line + 1})")
            known.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """What `_Loader` reads: the text 1e-6 is quoted."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, [*"-+.0123456789"])


def read_yaml(text: str) -> Any:
    """The value of a YAML text. Raises ValueError for anything else and for a key twice in one mapping."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"got no YAML ({error}), expected YAML or JSON") from error


def read_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError for anything else and for a key twice in one object."""
    try:
        return json.loads(text, object_pairs_hook=_to_dict, parse_constant=_refuse_constant)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"got no JSON ({error}), expected JSON") from error


def write_yaml(value: Any, **options: Any) -> str:
    """A YAML text that `read_yaml` reads as `value`."""
    return str(yaml.dump(value, Dumper=_Dumper, **options))


def _to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read: dict[str, Any] = {}
    for key, value in pairs:
        if key in read:
            raise _twice(key)
        read[key] = value
    return read


def _refuse_constant(written: str) -> None:
    raise ValueError(f"got {written}, expected a finite number or null")


def _twice(key: str, where: str = "") -> ValueError:
    return ValueError(f"got the key {key!r} twice{where}, expected it once")
