"""The newest package versions that the tests passed with, and a note for errors under newer ones."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

# As in requirements.lock, which no wheel contains; tests/project/test_versions.py compares the two.
TESTED = {
    "torch": "2.13.0",
    "triton": "3.7.1",
    "transformers": "5.24.0",
    "tokenizers": "0.23.3",
    "datasets": "5.2.0",
    "peft": "0.21.2",
    "huggingface-hub": "2.4.0",
    "pydantic": "2.14.3",
}


def newer_than_tested() -> list[str]:
    """A line for each installed package that is newer than the version in TESTED."""
    lines = []
    for package, tested in TESTED.items():
        try:
            installed = version(package)
        except PackageNotFoundError:
            continue
        if _release(installed) > _release(tested):
            lines.append(
                f"{package} {installed} is newer than {tested}, the newest that fastalign was tested with"
            )
    return lines


@contextmanager
def noting_newer_packages() -> Iterator[None]:
    """Add these lines to an exception, as notes, unless its message has them. Also a decorator."""
    try:
        yield
    except Exception as error:
        for line in newer_than_tested():
            if line not in str(error) and line not in getattr(error, "__notes__", ()):
                error.add_note(line)
        raise


def _release(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: (2, 13, 0) of "2.13.0+cpu"."""
    numbers = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(number) for number in numbers[0].split(".")) if numbers else ()
