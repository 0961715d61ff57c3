"""A warning fails a test of data, unless the test expects it."""

import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
