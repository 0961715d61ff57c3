"""The tail-compensated backward pass: GEMMs over the columns of the softmax that matter, and a rank-1 matrix
for all the others.

Of a block of C tokens with P = softmax(z) [C, V], let K be the columns where some token has p > eps, and
those of the tokens' ids. The gradient dz of these columns is exact. The dropped part D of P is replaced by
the rank-1 matrix with the same row sums and column sums,

    D ~ m q^T / sum(q),     m[t] = sum over dropped v of P[t, v],     q[v] = sum over t of P[t, v],

so that dX = dz_K W_K + r (q^T W) / sum(q) and dW[v] = q[v] / sum(q) (r^T X) outside of K, with r the dropped
row sums of dz itself, for any upstream gradient. q ignores the upstream gradient, so its sum cannot be zero.
docs/tail.md has the measured errors. All rows of W get their gradient. The products with q of many blocks
are two thin GEMMs.

GEMMs: 1 + 2 f for f = K / V, and dense (3) where f > DENSE. Kept between the passes: `Kept`, f of the block's
logits.

On Hopper GPUs linear/gpu/tail.py computes the same with GEMMs that skip columns. This file serves CPUs and
what that engine does not. Bytes beside the GEMMs: (16 + 6 f) V for each token and 22 f V H for each block
(its rows of W and dW gathered and put back; on a CPU with our own GEMMs they are gathered while they are
packed, 8 f V H), in bf16 with fp32 logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from torch import Tensor

from ..softmax.columns import column_sums
from ..softmax.rows import Coefficient
from .chunks import Operands, TokenChunk, first_true
from .counts import Counter
from .inputs import HeadInputs
from .plan import TOKENS

# Bytes of gathered columns, and of what is made of them, at a time. GEMMs stay large and memory stays small.
GATHERED_BYTES = 4 * 2**20
# Share of columns above which a chunk's gathers cost more than its smaller GEMMs save.
DENSE = 3 / 5
# Of tail_eps with a screen, whose blocks have fewer tokens (plan.SCREENED_TOKENS) and so keep fewer columns.
# Of SmolLM2's head at 2**-14 they keep 0.16 where 256 tokens keep 0.22, and dX is off by 0.15 %, not 0.13 %.
SCREENED_DIVISOR = 1.25


class KeptColumns(NamedTuple):
    """What the gradient of a chunk needs of its logits, for any coefficients."""

    columns: Tensor  # [K] int64, ascending
    logits: Tensor  # raw: [C, V], of which `columns` are the kept ones, or [C, K] of these
    totals: Tensor  # [2, C] fp64, sums over all columns of p dz/dx and of p log p dz/dx
    dropped_sums: Tensor  # [V], column sums of p dz/dx, 0 for the kept columns


class ColumnSelection(NamedTuple):
    """The columns to keep; the host does not know their number yet."""

    order: Tensor  # [V] or [K], the kept columns first
    how_many: Callable[[], int]
    sums: Tensor  # [V]
    totals: Tensor  # [2, C]


class ColumnCounts(NamedTuple):
    """Numbers of columns times tokens: those kept, and all."""

    kept: int = 0  # which entered backward GEMMs
    total: int = 0

    @property
    def share(self) -> float | None:
        """Share of the columns that were kept; None if no tail ran."""
        return self.kept / self.total if self.total else None


COUNTER = Counter(ColumnCounts())


def kept_share() -> float | None:
    """Share of the softmax's columns that entered backward GEMMs since the last call; resets the count.

    The count is that of all heads with tail_eps in this process, in all threads: ask from one place. None
    where none ran. It rises where a model is less sure. At 1 all chunks ran dense, and tail_eps saves
    nothing.
    """
    return COUNTER.take().share


def select_columns(inputs: HeadInputs, operands: Operands, chunk: TokenChunk) -> ColumnSelection:
    """The columns of a chunk where some token's probability exceeds tail_eps, and the tokens' ids."""
    largest, sums, totals = column_sums(
        chunk.logits, chunk.ids, operands.bias, inputs.options.transform, chunk.stats
    )
    options = inputs.options
    assert options.tail_eps is not None
    keep = largest > (options.tail_eps / SCREENED_DIVISOR if options.screen else options.tail_eps)
    # An ignored token keeps column 0 too, and an id beyond V, which CUDA does not check, the last: harmless.
    keep[chunk.ids.clamp(0, keep.numel() - 1)] = True
    return ColumnSelection(*first_true(keep), sums, totals)


def kept_columns(selection: ColumnSelection, logits: Tensor) -> KeptColumns | None:
    """The selected columns of the logits; None where they are so many that dense is faster."""
    C, V = logits.shape
    K = selection.how_many()
    dense = K > DENSE * V
    COUNTER.add(ColumnCounts(kept=C * (V if dense else K), total=logits.numel()))
    if dense:
        return None
    columns = selection.order[:K]
    return KeptColumns(columns, logits, selection.totals, selection.sums.index_fill(0, columns, 0))


def dropped_grad(totals: Tensor, coefficients: Tensor) -> Tensor:
    """Row sums [C] of dz over columns with these totals [2, C]."""
    prob, plogp = coefficients[Coefficient.PROB], coefficients[Coefficient.PLOGP]
    return (prob * totals[0] + plogp * totals[1]).to(coefficients.dtype)


def chunks_with_columns(
    inputs: HeadInputs,
    operands: Operands,
    chunks: Iterable[TokenChunk],
    coefficients: Callable[[TokenChunk], Tensor] | None = None,
) -> Iterator[tuple[TokenChunk, Tensor, KeptColumns | None]]:
    """Parts of at most TOKENS tokens, their coefficients [4, C], and kept columns (None: run dense).

    On a GPU the number of kept columns, which sizes the GEMMs, is asked for when the next chunk's logits are
    queued. The device then has work while the host waits.

    coefficients: of a chunk; without it the parts' are empty.
    """
    queued: list[tuple[TokenChunk, Tensor, ColumnSelection]] = []

    def finished() -> Iterator[tuple[TokenChunk, Tensor, KeptColumns | None]]:
        for part, part_coefficients, selection in queued:
            yield part, part_coefficients, kept_columns(selection, part.logits)

    for chunk in chunks:
        C, most = chunk.ids.numel(), TOKENS[inputs.hidden.device.type]
        of_chunk = chunk.stats.new_empty(0, C) if coefficients is None else coefficients(chunk)
        if not chunk.logits.shape[1]:  # a rank without rows
            yield chunk, of_chunk, None
            continue
        selected = []
        for begin in range(0, C, most):
            part = chunk.part(begin, min(begin + most, C))
            part_coefficients = of_chunk[:, begin : begin + most].contiguous()
            selected.append((part, part_coefficients, select_columns(inputs, operands, part)))
        if inputs.ids.is_cuda:
            yield from finished()
            queued = selected
        else:
            queued = selected
            yield from finished()
            queued = []
    yield from finished()
