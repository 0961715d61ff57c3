"""Fewer cells than a product of options has."""

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

import torch


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Cells of the product of the axes in which each value of an axis meets each value of each other axis.

    For a kernel in Triton's interpreter, where a cell takes a second: 12 cells of a product of 3 x 4 x 3.
    """

    def pairs_of(cell: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(combinations(enumerate(cell), 2))

    cells = list(product(*(range(len(axis)) for axis in axes)))
    left = set[tuple[tuple[int, int], ...]]().union(*map(pairs_of, cells))
    chosen = []
    while left:
        best = max(cells, key=lambda cell: len(pairs_of(cell) & left))
        left -= pairs_of(best)
        chosen.append(tuple(axis[place] for axis, place in zip(axes, best, strict=True)))
    return chosen


def triton_in_pairs(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Cells of native, reference and Triton kernels: the product of the axes, but `pairwise` for Triton where
    the interpreter runs it."""
    whole = list(product(*axes))
    of_triton = whole if torch.cuda.is_available() else pairwise(*axes)
    names = {"native": whole, "reference": whole, "triton": of_triton}
    return [(name, *cell) for name, cells in names.items() for cell in cells]
