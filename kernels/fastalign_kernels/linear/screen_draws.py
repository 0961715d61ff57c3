"""Screened logits to draw tokens from: `sample` draws from them the token that it draws from exact logits.

A decode step reads the whole weight for a few tokens. In 8 bits that is a quarter of the bytes of fp32. The
bound |z - z8| of each column says which exact logits decide the draw (csrc/screen/draw.h has the rules):

    greedy, top-k, min-p, top-k with top-p   the columns that may reach the threshold: proven the same token
    no filter                                the chunks that may win the race: proven the same token
    top-p alone                              the columns that the threshold of mixed logits keeps. The mass of
                                             the columns that are not exact has their errors, so the threshold
                                             may differ. A token is counted as open if the bound allows a
                                             threshold at which another one is drawn.

"The same" is up to the rounding of fp32 products. The columns with a probability above EXACT_EPS are exact
too, so logp, log_kept, logp_raw and entropy have the errors that a screen has elsewhere (screen.py). A row
that needs more than a 16th of the columns is computed exactly, all its logits. If most rows of a step are,
the next PAUSE steps are exact as a whole.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..gemm import mm, uses_native_gemm
from ..gemm_int8 import LEFT, LOW, RIGHT, CodedRows, code_rows, mm_int8, unit_stride
from ..namespace import ops
from ..sampling_inputs import SampleInputs, sample_inputs
from ..softmax.rows import Transform, transform_ref
from .screen import COUNTER, EXACT_EPS, UNRESOLVED, ScreenCounts
from .screen_weight import ScreenedWeight, code_weight, screened_weight

ROUNDING = 1e-5  # relative to |x| |w|: of the fp32 arithmetic of both logits
LARGEST_SHARE = 1 / 16  # of a row's columns
MOST_OF_FEW = 1024  # columns of a row that may be exact where V is small
PAUSE = 16  # steps that run exact after one in which most rows had to
IDENTITY = Transform(1.0, 0.0, 1.0)


class _Prepared(NamedTuple):
    """A head's weight, prepared for draws while it does not change."""

    given: Tensor  # the weight as the caller has it
    weight: Tensor  # of the products
    bias: Tensor | None
    coded: ScreenedWeight
    column_bounds: Tensor  # [2, V]: the lengths of ScreenedWeight's rows, and of their codes' errors
    largest_low: float  # over the rows, of their part along the basis
    largest_bias: float

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> _Prepared:
        given, weight = weight, unit_stride(weight.detach().to(dtype))
        # A copy in another dtype has other numbers, and codes of its own, which no later call asks for.
        coded = screened_weight(weight) if weight.dtype == given.dtype else code_weight(weight)
        if not uses_native_gemm(weight.device, dtype):
            weight = weight.float()  # torch's products would round logits to their factors' dtype
        return cls(
            given,
            weight,
            None if bias is None else bias.detach().float(),
            coded,
            torch.stack([coded.rows.lengths, coded.rows.residuals]),
            float(_low_lengths(coded.rows).amax()),
            0.0 if bias is None else float(bias.abs().amax()),
        )


def _low_lengths(rows: CodedRows) -> Tensor:
    """Lengths [O'] of the parts along the basis, of the rows and of those that fill the last panel."""
    panel, first = (LEFT, LEFT) if rows.left else (RIGHT, 2 * RIGHT)
    words = -(-rows.coding.width // 4)
    panels = rows.packed.view(-1, first + panel * (LOW + words))
    low = panels[:, first : first + panel * LOW].view(torch.float32)
    return low.unflatten(1, (LOW, panel)).square().sum(1).sqrt().flatten()


class ScreenedDraws:
    """The logits of one head for the draws of a rollout. Its weight must not change meanwhile."""

    def __init__(self, logit_scale: float, softcap: float | None) -> None:
        self.transform = Transform(logit_scale, softcap or 0.0, 1.0)
        self.prepared: _Prepared | None = None
        self.tile: Tensor | None = None  # kept, because new pages take longer than the products
        self.pause = 0

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
        """Logits [B, V] fp32 of hidden [B, H], exact where they decide what `sample` draws with `options`.

        weight [V, H] and bias [V] are the head's; logit_scale and softcap are applied. Call `sample` with the
        same options, before the next call, which writes into the same memory. Rows that are finished hold
        numbers of no meaning.
        """
        if self.prepared is None or self.prepared.given is not weight:
            self.prepared = _Prepared.of(weight, bias, hidden.dtype)
        head, hidden = self.prepared, unit_stride(hidden.detach())
        B, V = hidden.shape[0], head.weight.shape[0]
        if self.tile is None or self.tile.shape[0] != B:
            self.tile = hidden.new_empty(B, V, dtype=torch.float32)
        inputs = sample_inputs(self.tile, **options)
        drawn = B if inputs.finished is None else B - int(inputs.finished.sum())
        if self.pause:
            self.pause -= 1
            counts, unresolved = ScreenCounts(), torch.arange(B)
        else:
            counts, unresolved = self._screen(hidden, head, inputs)
            self.pause = PAUSE if 2 * unresolved.numel() > drawn else 0
        if unresolved.numel():
            self._write_exact(hidden, head, unresolved)
        exact = min(unresolved.numel(), drawn)
        COUNTER.add(counts._replace(tokens=drawn, exact_tokens=exact))
        return self.tile

    def _screen(self, hidden: Tensor, head: _Prepared, inputs: SampleInputs) -> tuple[ScreenCounts, Tensor]:
        """Fill the tile; what was counted, and the rows that must be computed exactly."""
        assert self.tile is not None
        B, V = self.tile.shape
        rows = code_rows(hidden, head.coded.rows.coding, left=True)
        mm_int8(rows, head.coded.rows, self.tile)
        counts = self.tile.new_empty(2, B, dtype=torch.int32)
        ops.screen_draws(
            self.tile,
            hidden.to(head.weight.dtype),
            head.weight,
            head.bias,
            self.transform.logit_scale,
            self.transform.softcap,
            EXACT_EPS,
            max(int(LARGEST_SHARE * V), MOST_OF_FEW),
            self._row_bounds(rows, head),
            head.column_bounds,
            counts,
            *inputs[1:-1],
        )
        found = ScreenCounts(
            exact_columns=int(counts[0].clamp(min=0).sum()), open_tokens=int(counts[1].sum())
        )
        return found, (counts[0] == UNRESOLVED).nonzero()[:, 0]

    def _write_exact(self, hidden: Tensor, head: _Prepared, rows: Tensor) -> None:
        assert self.tile is not None
        hidden, weight = hidden.to(head.weight.dtype), head.weight.t()
        if rows.numel() == self.tile.shape[0]:
            mm(hidden, weight, self.tile)
        else:
            mm(hidden[rows], weight, self.tile, out_rows=rows)
        if head.bias is not None or self.transform != IDENTITY:
            self.tile[rows] = transform_ref(self.tile[rows], head.bias, self.transform)

    def _row_bounds(self, rows: CodedRows, head: _Prepared) -> Tensor:
        """The factors of a column's length and of its residual in the bound, and its last term: [3, B]."""
        low = _low_lengths(rows)[: rows.lengths.numel()]
        slack = low * head.largest_low + (rows.lengths + rows.residuals) * head.coded.largest_length
        bounds = torch.stack([rows.residuals, rows.lengths, ROUNDING * (slack + head.largest_bias)])
        bounds *= abs(self.transform.logit_scale)
        bounds[2] += ROUNDING * self.transform.softcap
        return bounds
