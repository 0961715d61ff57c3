"""Screened logits: 8-bit logits everywhere, exact ones where they matter.

With z8 the 8-bit logits of a token (gemm_int8.py) and K its columns with exp(z8 - lse8) > EXACT_EPS, its
target and its largest columns:

    exact z in K,   normaliser = sum over K of exp(z) + sum over the rest of exp(z8)

logp, entropy and lse follow, and top-1 is that of exact logits. Measured on SmolLM2's head with 2048 tokens
of English text, 330 of 49152 columns of a token are exact. logp is off by 1.1e-4 nats rms and 8e-4 at most,
entropy by 8e-4 rms. PyTorch's logits in bf16 put logp off by 3.1e-2.

GEMMs of a forward pass: about 1 / 4, of 8-bit products, plus 16 / H for the directions that are exact.
Without gradients no logits are in memory: csrc/screen takes the statistics of 128 tokens and 192 columns at a
time. With gradients a tile holds z in K and z8 elsewhere, and the rest of the engine runs on it as on exact
logits (accumulate.py, tail_columns.py).

A token is computed exactly, all its logits, if the 8-bit error is too large for it (`LARGEST_NOISE`: an
enormous coordinate, logits of 1e4, NaN), or if more columns matter than `csrc/screen/api.h` allows. If that
is so for most of the first tokens of a call, all of it is computed exactly. `screen_counts` tells how many.
A token's result depends on that token and the weight alone, except for that decision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ..gemm import mm
from ..gemm_int8 import code_rows, unit_stride
from ..namespace import ops
from ..softmax.rows import Stat, row_stats
from .inputs import HeadInputs
from .screen_weight import ScreenedWeight, screened_weight

EXACT_EPS = 2.0**-14  # a column of a larger probability gets its exact logit
LARGEST_NOISE = 0.25  # nats: standard deviation of a token's z8 - z above which it is computed exactly
MARGIN = 12.0  # standard deviations below the largest z8 within which a column may have the largest z
PROBED_TOKENS = 64  # of a call; most of them must be screened for the rest to be
UNRESOLVED = -1  # of csrc/screen


class ScreenCounts(NamedTuple):
    """Sums over calls."""

    tokens: int = 0  # of calls with screen
    exact_tokens: int = 0  # of these, computed exactly
    exact_columns: int = 0  # logits that were made exact, over the other tokens
    open_columns: int = 0  # with check=True: columns that the bound could not rule out


class ScreenCounter:
    """Adds up the counts of all heads with screen in this process."""

    def __init__(self) -> None:
        self.counts = ScreenCounts()

    def add(self, counts: ScreenCounts) -> None:
        self.counts = ScreenCounts(*(a + b for a, b in zip(self.counts, counts)))

    def reset(self) -> None:
        self.counts = ScreenCounts()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Counts inside do not last."""
        before = self.counts
        try:
            yield
        finally:
            self.counts = before


COUNTER = ScreenCounter()


def screen_counts() -> ScreenCounts:
    """What was screened since this was last asked. It counts all heads with screen in this process."""
    counts = COUNTER.counts
    COUNTER.reset()
    return counts


class Screened(NamedTuple):
    """Statistics of some tokens."""

    stats: Tensor  # [7, C]
    unresolved: Tensor  # [M] int64: tokens without statistics, which must be computed exactly


class Screen:
    """The screen of one head call: its weight's codes, and whether it has given up."""

    def __init__(self, inputs: HeadInputs, weight: Tensor, bias: Tensor | None) -> None:
        """weight, bias: of the GEMMs (chunks.Operands); the codes are those of the call's own weight."""
        self.options, self.weight, self.bias = inputs.options, unit_stride(weight), bias
        self.coded: ScreenedWeight = screened_weight(inputs.weight)
        self.probed = self.given_up = False

    def run(self, hidden: Tensor, ids: Tensor, tile: Tensor | None = None) -> Screened:
        """Screen tokens: hidden [C, H] as it enters a GEMM, ids [C]; tile [C, V] takes their logits."""
        C = ids.numel()
        done = 0
        parts = []
        if not self.probed:
            self.probed = True
            done = min(C, PROBED_TOKENS)
            parts.append(self._screen(hidden[:done], ids[:done], None if tile is None else tile[:done]))
            self.given_up = 2 * parts[0].unresolved.numel() > done
        if done < C:
            if self.given_up:
                empty = torch.zeros(len(Stat), C - done)
                parts.append(Screened(empty, torch.arange(C - done)))
                COUNTER.add(ScreenCounts(C - done, C - done))
            else:
                part = self._screen(hidden[done:], ids[done:], None if tile is None else tile[done:])
                parts.append(part)
        if len(parts) == 1:
            return parts[0]
        first, second = parts
        return Screened(
            torch.cat([first.stats, second.stats], 1),
            torch.cat([first.unresolved, second.unresolved + done]),
        )

    def fill(self, hidden: Tensor, ids: Tensor, tile: Tensor) -> Tensor:
        """Write the logits of tokens into tile [C, V], exact ones for those that cannot be screened; the
        statistics [7, C]."""
        stats, unresolved = self.run(hidden, ids, tile)
        if not unresolved.numel():
            return stats
        weight = self.weight.t()
        exact_ids = torch.full_like(ids, -1)
        exact_ids[unresolved] = ids[unresolved]
        if unresolved.numel() == ids.numel():
            mm(hidden, weight, tile)
        else:
            mm(hidden[unresolved], weight, tile, out_rows=unresolved)
        exact = row_stats(tile[None], exact_ids, self.bias, self.options.transform)
        return torch.where(exact_ids >= 0, exact, stats)

    def _screen(self, hidden: Tensor, ids: Tensor, tile: Tensor | None) -> Screened:
        C, coded, options = ids.numel(), self.coded, self.options
        coding = coded.rows.coding
        hidden = unit_stride(hidden)
        rows = code_rows(hidden, coding, left=True)
        factor = abs(options.logit_scale) / options.temperature
        noise = factor * (rows.residuals * coded.mean_length + rows.lengths * coded.mean_residual)
        noise = noise / math.sqrt(coding.width)
        margins = torch.where(noise <= LARGEST_NOISE, MARGIN * noise, torch.inf)
        bounds = None
        if options.check:
            bounds = rows.residuals * coded.largest_length + rows.lengths * coded.largest_residual
            bounds *= factor
        stats = hidden.new_empty(len(Stat), C, dtype=torch.float32)
        counts = hidden.new_empty(2, C, dtype=torch.int32)
        ops.screen_rows(
            rows.packed,
            coded.rows.packed,
            coding.width,
            hidden,
            self.weight,
            ids,
            self.bias,
            *options.transform,
            EXACT_EPS,
            margins,
            bounds,
            stats,
            counts,
            tile,
        )
        bad = counts[0] == UNRESOLVED
        unresolved = bad.nonzero()[:, 0]
        open_columns = int(counts[1][~bad].sum())
        COUNTER.add(ScreenCounts(C, unresolved.numel(), int(counts[0].clamp(min=0).sum()), open_columns))
        return Screened(stats, unresolved)
