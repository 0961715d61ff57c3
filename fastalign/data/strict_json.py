"""JSON by the standard library, without what it would change or accept silently.

Numbers become ints of any size, or doubles. Refused are: a key twice in one object (the first value would
be lost), NaN and Infinity, numbers beyond the range of doubles (they would become infinite or 0), half a
surrogate pair, whole numbers of more than 4,300 digits, and nesting deeper than NESTING.
"""

import json
import math
import re
from collections import Counter
from typing import Any

NESTING = 200  # levels; Python's own limit depends on its version and on who calls, and templates recurse too


class Fault(ValueError):
    """A JSON text has a fault that Python's parser would accept."""


def _to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise Fault(f"got key {name!r} twice in one object, expected it once")
    return made


def _to_float(written: str) -> float:
    value = float(written)
    if math.isinf(value) or (value == 0 and NOT_ZERO.match(written)):
        raise Fault(f"got number {written[:20]}, expected one in the range of doubles")
    return value


def _refuse_constant(written: str) -> None:
    raise Fault(f"got {written}, expected JSON: write null")


DECODER = json.JSONDecoder(object_pairs_hook=_to_dict, parse_float=_to_float, parse_constant=_refuse_constant)
NOT_ZERO = re.compile(r"[^eE]*[1-9]")
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
SPACE = re.compile(r"[ \t\n\r]*")


def decode_object(text: str, begin: int) -> tuple[dict[str, Any], int]:
    """The object that begins at `begin`, and where it ends."""
    try:
        record, end = DECODER.raw_decode(text, begin)
    except (json.JSONDecodeError, Fault):
        raise
    except RecursionError as error:
        raise Fault(f"got more than {NESTING} nested levels, expected at most {NESTING}") from error
    except ValueError as error:
        raise Fault(
            "got a whole number of too many digits, expected at most 4300, as Python reads"
        ) from error
    if not isinstance(record, dict):
        raise Fault(f"got {type(record).__name__}, expected a JSON object")
    if text.count("{", begin, end) + text.count("[", begin, end) > NESTING:
        _check_nesting(record)
    if SURROGATE.search(text, begin, end):  # JSON can spell half a surrogate pair, which is no text
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise Fault(f"got a text that is not Unicode ({error.reason}), expected Unicode") from error
    return record, end


def skip_space(text: str, begin: int) -> int:
    """The first index from `begin` on that is no white space of JSON."""
    end: int = SPACE.match(text, begin).end()  # type: ignore[union-attr]  # it matches anywhere
    return end


def _check_nesting(record: Any) -> None:
    level, depth = [record], 0
    while level:
        depth += 1
        if depth > NESTING:
            raise Fault(f"got more than {NESTING} nested levels, expected at most {NESTING}")
        values = (value for one in level for value in (one.values() if isinstance(one, dict) else one))
        level = [value for value in values if isinstance(value, dict | list)]
