"""The pages of docs/ are true: their Python runs, and prints what stands below it."""

import contextlib
import io
import re
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
EXAMPLE = re.compile(r"```python\n(.*?)```\n+```\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_examples_print_what_the_page_says(page: Path) -> None:
    for code, printed in EXAMPLE.findall(page.read_text(encoding="utf-8")):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(code, page.name, "exec"), {})
        assert output.getvalue() == printed


def test_there_is_an_example() -> None:
    assert any(EXAMPLE.search(page.read_text(encoding="utf-8")) for page in PAGES)
