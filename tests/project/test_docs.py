"""Pages and comments are true: Python prints what a page says, and links and file names lead somewhere."""

import ast
import contextlib
import importlib.util
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch

from tests.project.tracked import ROOT, tracked

PAGES = sorted((ROOT / "docs").glob("*.md"))

LINKING = [ROOT / "CONTRIBUTING.md", *(ROOT / name for name in tracked("*README.md")), *PAGES]
EXAMPLE = re.compile(r"```python\n(.*?)```\n+```\n(.*?)```", re.DOTALL)
PATH = re.compile(r"\b(?:tests|bench|docs|fastalign|kernels|csrc|examples)/[\w./]+\.(?:py|md|json|h|cpp)\b")
NAME = re.compile(r"(?<![\w/.*<{-])((?:[\w-]+/)*[\w-]+\.(?:md|py|cpp|h|cu))\b")
FILES = tracked()
# Names of no file of the repository, by reason.
ELSEWHERE = {
    *("report.md", "runs/demo/report.md"),  # `fastalign demo` writes it
    *("my_rewards.py", "file.py"),  # the user's
    *("NAME.py", "linear/NAME.py", "_triton.py"),  # any file of a kind
    *("kernels/__init__.py", "no/such.py"),  # a test says that it is absent
    *("axolotl/integrations/base.py", "pytest/__init__.py"),  # another package's
    *("verl/models/transformers/fused_lm_head.py", "actor.py"),  # another package's: verl, OpenRLHF
}
MODULE = re.compile(r"python3? -m ((?:tests|bench|fastalign)\b[\w.]*\w)")
LINK = re.compile(r"\]\(([^)#:]*)(?:#([^)]*))?\)")


@pytest.fixture
def threads() -> Iterator[None]:
    """docs/determinism.md sets the number of threads, and other tests of this process depend on it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_examples_print_what_the_page_says(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    examples = EXAMPLE.findall(text)
    assert len(examples) == text.count("```python\n"), "an example is followed by what it prints"
    for code, printed in examples:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(code, page.name, "exec"), {})
        assert output.getvalue() == printed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_says_first_whom_it_is_for(page: Path) -> None:
    title, _, opening, *_ = page.read_text(encoding="utf-8").splitlines()
    assert title.startswith("# ") and opening.startswith("You are here because ")


def anchors(page: Path) -> list[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_of_the_repository(page: Path) -> None:
    for target, heading in LINK.findall(page.read_text(encoding="utf-8")):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        assert not heading or heading in anchors(linked), f"{target}#{heading}"


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_files_and_modules_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in PATH.findall(text):
        assert (ROOT / name).exists(), name
    for module in MODULE.findall(text):
        assert importlib.util.find_spec(module), module


def prose(path: Path) -> list[str]:
    """The comments of a source file, and of Python also the docstrings and the messages."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return re.findall(r"//.*", text)
    nodes = ast.walk(ast.parse(text))
    strings = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [*re.findall(r"#.*", text), *(string for string in strings if " " in string)]


def missing(texts: Iterable[str]) -> set[str]:
    """The files that the texts name and the repository lacks. A name may leave out the outer folders."""
    names = {name for text in texts for name in NAME.findall(text)} - ELSEWHERE
    return {name for name in names if not any(f"/{file}".endswith(f"/{name}") for file in FILES)}


@pytest.mark.parametrize("folder", ["kernels", "fastalign", "bench", "tests", ".ci", "examples", "csrc"])
def test_the_files_that_comments_and_docstrings_name_exist(folder: str) -> None:
    sources = tracked(*(f"{folder}/*.{ending}" for ending in ("py", "cpp", "h", "cu")))
    found = {name: missing(prose(ROOT / name)) for name in sources}
    assert {name: lost for name, lost in found.items() if lost} == {} != found


def test_the_files_that_pages_name_exist() -> None:
    found = {str(page.relative_to(ROOT)): missing([page.read_text(encoding="utf-8")]) for page in LINKING}
    assert {name: lost for name, lost in found.items() if lost} == {}


def test_each_folder_of_the_packages_says_which_file_to_open_first() -> None:
    for folder in {str(Path(name).parent) for name in tracked("kernels/*.py", "fastalign/*.py")}:
        readme = ROOT / folder / "README.md"
        assert readme.exists(), folder
        assert re.search(r"\b[oO]pen\b", readme.read_text(encoding="utf-8")), readme


def test_the_readme_of_the_gpu_engines_names_each_of_their_files() -> None:
    folder = ROOT / "kernels" / "fastalign_kernels" / "linear" / "gpu"
    named = set(re.findall(r"`(\w+\.py)`", (folder / "README.md").read_text(encoding="utf-8")))
    assert {path.name for path in folder.glob("*.py")} - {"__init__.py"} <= named


def test_contributing_lists_the_targets_of_make() -> None:
    (targets,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    listed = re.findall(r"^\| `make ([\w-]+)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert set(listed) == set(targets.split()) - {"setup", "clean"}
