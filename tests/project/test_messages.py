"""Refusals of all packages have one form: `argument: got X, expected Y`."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What a caller asked for in another way than by an argument, or by a name that Python defines.
NO_REFUSAL = {
    *("AttributeError", "IndexError", "KeyError", "json.JSONDecodeError"),
    *("Absent", "Stopped", "_error", "SystemExit"),
}


def text_of(node: ast.expr) -> str:
    """The literal parts of a string or an f-string; what is filled in is {}."""
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return str(node.value) if isinstance(node, ast.Constant) else "{}"


def refusals(package: str) -> Iterator[tuple[str, str]]:
    """Place and text of each error that a package raises."""
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            error = node.exc if isinstance(node, ast.Raise) else None
            if isinstance(error, ast.Call) and error.args and ast.unparse(error.func) not in NO_REFUSAL:
                yield f"{path.relative_to(ROOT)}:{error.lineno}", text_of(error.args[0])


def is_whole(text: str) -> bool:
    """Whether a text has the form, or passes on one that has it behind a place such as "a.jsonl, row 3"."""
    return (": got " in text or text.startswith("got ")) and ", expected " in text or text.endswith("{}")


@pytest.mark.parametrize("package", ["kernels/fastalign_kernels", "fastalign", "bench"])
def test_each_refusal_says_what_was_got_and_what_is_expected(package: str) -> None:
    wrong = [f"{place}: {text}" for place, text in refusals(package) if not is_whole(text)]
    assert not wrong, "\n".join(wrong)
