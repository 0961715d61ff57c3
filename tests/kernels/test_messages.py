"""Refusals of fastalign_kernels have one form."""

import ast
from pathlib import Path

import fastalign_kernels

FOLDER = Path(fastalign_kernels.__file__).parent


def text_of(node: ast.expr) -> str:
    """The literal parts of a string or an f-string; what is filled in is {}."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return str(node.value) if isinstance(node, ast.Constant) else ""


def test_each_refusal_says_what_was_got_and_what_is_expected() -> None:
    wrong = []
    for path in sorted(FOLDER.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                name = ast.unparse(node.exc.func)
                text = text_of(node.exc.args[0]) if name == "ValueError" else ": got , expected "
                if ": got " not in text or ", expected " not in text:
                    wrong.append(f"{path.relative_to(FOLDER)}:{node.lineno}: {text}")
    assert not wrong, "\n".join(wrong)
