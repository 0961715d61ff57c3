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
is so for most of the first tokens of a call, or if more than `LARGEST_SHARE` of the columns matter to some
that are probed, all of it is computed exactly. `screen_counts` tells how many. A token's result depends on
that token and the weight alone, except for that decision.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..gemm import mm
from ..gemm_int8 import code_rows, unit_stride
from ..namespace import ops
from ..softmax.rows import Stat, row_stats, transform_ref
from .counts import Counter
from .inputs import HeadInputs
from .screen_weight import ScreenedWeight, screened_weight

EXACT_EPS = 2.0**-14  # a column of a larger probability gets its exact logit
LARGEST_NOISE = 0.25  # nats: standard deviation of a token's z8 - z above which it is computed exactly
MARGIN = 12.0  # standard deviations below the largest z8 within which a column may have the largest z
LARGEST_SHARE = 1 / 32  # of the columns that are exact: beyond it dense products are faster
EXACTLY_PROBED = 16  # tokens of a call, for that share
PROBED_TOKENS = 64  # of a call; most of them must be screened for the rest to be
UNRESOLVED = -1  # of csrc/screen


class ScreenCounts(NamedTuple):
    """What was screened, summed over calls."""

    tokens: int = 0  # of calls with screen
    exact_tokens: int = 0  # of these, computed exactly
    exact_columns: int = 0  # logits that were made exact, over the other tokens
    open_columns: int = 0  # with check=True: columns that the bound could not rule out
    open_tokens: int = 0  # of rollouts with top-p: tokens of which the bound allows another draw


COUNTER = Counter(ScreenCounts())


def screen_counts() -> ScreenCounts:
    """What was screened since the last call; resets the counts.

    They are those of all heads with screen in this process, in all threads: ask from one place.
    """
    return COUNTER.take()


class Screened(NamedTuple):
    """The statistics of screened tokens, and the tokens that must run exact."""

    stats: Tensor  # [7, C]
    unresolved: Tensor  # [M] int64: tokens without statistics, which must be computed exactly


class Screen:
    """The screen of one head call: its weight's codes, and whether it has given up."""

    def __init__(self, inputs: HeadInputs, weight: Tensor, bias: Tensor | None) -> None:
        """weight, bias: of the GEMMs (chunks.Operands); the codes are those of the call's own weight."""
        self.options, self.weight, self.bias = inputs.options, unit_stride(weight), bias
        self.coded_from = inputs.weight
        self.coded: ScreenedWeight | None = None
        self.probed = self.given_up = False

    def run(self, hidden: Tensor, ids: Tensor, tile: Tensor | None = None) -> Screened:
        """Screen tokens: hidden [C, H] as it enters a GEMM, ids [C]; tile [C, V] takes their logits."""
        if self.probed or not ids.numel():
            return self._screen_or_not(hidden, ids, tile)
        self.probed = True
        if self._is_flat(hidden):
            self.given_up = True
            return self._screen_or_not(hidden, ids, tile)
        done = min(ids.numel(), PROBED_TOKENS)
        first = self._screen(hidden[:done], ids[:done], None if tile is None else tile[:done])
        self.given_up = 2 * first.unresolved.numel() > done
        rest = self._screen_or_not(hidden[done:], ids[done:], None if tile is None else tile[done:])
        return Screened(
            torch.cat([first.stats, rest.stats], 1), torch.cat([first.unresolved, rest.unresolved + done])
        )

    def _is_flat(self, hidden: Tensor) -> bool:
        """Whether so many columns matter to some of these tokens that dense products are faster."""
        some = hidden[:: max(1, hidden.shape[0] // EXACTLY_PROBED)][:EXACTLY_PROBED]
        logits = some.new_empty(some.shape[0], self.weight.shape[0], dtype=torch.float32)
        mm(some, self.weight.t(), logits)
        z = transform_ref(logits, self.bias, self.options.transform)
        matter = z > z.logsumexp(1, keepdim=True) + math.log(EXACT_EPS)
        return int(matter.sum()) > LARGEST_SHARE * matter.numel()

    def _screen_or_not(self, hidden: Tensor, ids: Tensor, tile: Tensor | None) -> Screened:
        if not self.given_up:
            return self._screen(hidden, ids, tile)
        C = ids.numel()
        COUNTER.add(ScreenCounts(C, C))
        return Screened(hidden.new_zeros(len(Stat), C, dtype=torch.float32), torch.arange(C))

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

    def _coded(self) -> ScreenedWeight:
        """The weight's codes, made at their first use: a call that gives up at once needs none."""
        if self.coded is None:
            self.coded = screened_weight(self.coded_from)
        return self.coded

    def _screen(self, hidden: Tensor, ids: Tensor, tile: Tensor | None) -> Screened:
        C, coded, options = ids.numel(), self._coded(), self.options
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
