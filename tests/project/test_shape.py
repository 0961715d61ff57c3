"""The size and shape of the code: short files, few positional arguments, no circles, plain words."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.project.test_layout import ROOT, imports_within
from tests.project.tracked import tracked

MOST_LINES = 400
MOST_POSITIONAL = 8
# Signatures that another package gives, by file and function.
GIVEN = {
    ("fastalign/integrations/liger/cross_entropy.py", "__init__"),
    ("fastalign/integrations/liger/grpo.py", "__init__"),
    ("fastalign/integrations/liger/grpo.py", "forward"),
    ("fastalign/integrations/liger/kto.py", "forward"),
    ("fastalign/integrations/liger/preference.py", "__init__"),
    ("fastalign/integrations/trl.py", "apply"),
}
# Words that the field does not use. `HeadPlan.way` is public, and TrainConfig counts steps as others do.
PRIVATE_WORDS = re.compile(r"(?:^|_)(own|wanted|ways?|sweeps?|keeping|others|every)(?:_|$)")
PUBLIC_NAMES = {"way", "eval_every", "save_every"}
DANGLING = re.compile(r"(Of|As|The same|See|Those|Likewise|Like|From|With|Without)\b")
PYTHON = tracked("*.py")


def functions(path: str) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.FunctionDef):
            yield node


def is_kernel(function: ast.FunctionDef) -> bool:
    """Of Triton: its arguments are pointers, sizes, strides, options and constexprs, which launches group."""
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def names_of(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.arg):
        return [node.arg]
    if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("test_"):
        return [node.name]
    return []


@pytest.mark.parametrize("folder", ["kernels", "fastalign", "bench", "tests", ".ci", "examples"])
def test_no_function_takes_more_than_eight_positional_arguments(folder: str) -> None:
    for path in (path for path in PYTHON if path.startswith(f"{folder}/")):
        for function in functions(path):
            given = [*function.args.posonlyargs, *function.args.args]
            names = [argument.arg for argument in given if argument.arg not in ("self", "cls", "ctx")]
            if (path, function.name) not in GIVEN and not is_kernel(function):
                assert len(names) <= MOST_POSITIONAL, f"{path}: {function.name}({', '.join(names)})"


def test_a_file_is_read_in_one_sitting() -> None:
    for path in (*PYTHON, *tracked("csrc")):
        assert len((ROOT / path).read_text().splitlines()) <= MOST_LINES, path


@pytest.mark.parametrize("package", ["bench", "fastalign", "kernels"])
def test_no_files_import_each_other_in_a_circle(package: str) -> None:
    TopologicalSorter(imports_within(package)).prepare()  # raises CycleError with the circle


def test_no_name_is_a_private_word() -> None:
    for path in PYTHON:
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            for name in names_of(node):
                assert not PRIVATE_WORDS.search(name) or name in PUBLIC_NAMES, f"{path}: {name}"


def test_a_docstring_stands_alone() -> None:
    """Its first words are no reference to the function's name or to another docstring."""
    for path in tracked("kernels/*.py", "fastalign/*.py", "bench/*.py"):
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                docstring = ast.get_docstring(node) or ""
                assert not DANGLING.match(docstring), f"{path}: {docstring.splitlines()[0]}"


def test_what_another_package_gives_is_still_there() -> None:
    found = {(path, function.name) for path, _ in GIVEN for function in functions(path)}
    assert {*GIVEN} <= found and all(Path(ROOT / path).is_file() for path, _ in GIVEN)
