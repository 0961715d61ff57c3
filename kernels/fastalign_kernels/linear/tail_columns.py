"""The tail-compensated backward pass: GEMMs over the columns of the softmax that matter, and a rank-1 matrix
for all the others.

Of a block of C tokens with P = softmax(z) [C, V], let K be the columns where some token has p > eps, and
those of the tokens' ids. The gradient dz of these columns is exact. The dropped part D of P is replaced by
the rank-1 matrix with the same row sums and column sums,

    D ~ m q^T / sum(q),     m[t] = sum over dropped v of P[t, v],     q[v] = sum over t of P[t, v],

so that dX = dz_K W_K + r (q^T W) / sum(q) and dW[v] = q[v] / sum(q) (r^T X) outside of K, with r the dropped
row sums of dz itself, for any upstream gradient. q is taken without the upstream gradient, so that its terms
have one sign and cannot cancel (DESIGN.md section 3 has the measured errors). All rows of W get their
gradient. The products with q of many blocks are two thin GEMMs.

GEMMs: 1 + 2 f for f = K / V, and dense (3) where f > DENSE. Kept between the passes: `Kept`, f of the block's
logits.

Bytes beside the GEMMs: (16 + 6 f) V for each token and 22 f V H for each block (its rows of W and dW gathered
and put back; on a CPU with our own GEMMs they are gathered while they are packed, 8 f V H), in bf16 with fp32
logits. Predicted, not measured, for N 8192, H 4096, V 151936 on an H100 (700 TFLOP/s reached, 3.35 TB/s; the
exact way: 47 ms): 52 ms in the 24 blocks of 353 tokens that 512 MiB hold (f 0.25), 43 ms in the 6 of 2 GiB (f
0.4). So there it pays where logits would be made twice (62 ms exact), and for cross-entropy with a large
workspace only; a GEMM that gathers its own rows, as the CPU's does, is the next step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..softmax.columns import column_sums
from ..softmax.rows import Coefficient, Transform

_seen = {"kept": 0, "all": 0}  # columns times tokens since `kept_share` was last asked

GATHERED_BYTES = (
    4 * 2**20
)  # of gathered columns and of what is made of them, at a time: GEMMs stay large, memory stays small
DENSE = 3 / 5  # share of columns above which a block's gathers cost more than its smaller GEMMs save


class Kept(NamedTuple):
    """What the gradient of a block needs of its logits, for any coefficients."""

    columns: Tensor  # [K] int64, ascending
    logits: Tensor  # raw: [C, V], of which `columns` are the kept ones, or [C, K] of these
    totals: Tensor  # [2, C] fp64, sums over all columns of p dz/dx and of p log p dz/dx
    others: Tensor  # [V], column sums of p dz/dx, 0 for the kept columns


class Choice(NamedTuple):
    """The columns to keep, before the host knows how many they are."""

    order: Tensor  # [V] or [K], the kept columns first
    how_many: Callable[[], int]
    sums: Tensor  # [V]
    totals: Tensor  # [2, C]


def kept_share() -> float | None:
    """Share of the softmax's columns that entered backward GEMMs in this process since this was last asked,
    over all heads with tail_eps.

    None where none ran. It rises where a model is less sure: at 1 all blocks ran dense, and tail_eps saves
    nothing.
    """
    share = _seen["kept"] / _seen["all"] if _seen["all"] else None
    _seen.update(kept=0, all=0)
    return share


def first_true(mask: Tensor) -> tuple[Tensor, Callable[[], int]]:
    """Indices with those of True first, in order (on a CPU only those), and a function that tells how many
    they are.

    On a GPU the count is copied to pinned memory, and the function waits for no more than what was queued
    before this call.
    """
    if not mask.is_cuda:
        index = mask.nonzero()[:, 0]
        return index, index.numel
    order = torch.argsort(~mask, stable=True)
    count = torch.empty(1, dtype=torch.int64, pin_memory=True)
    count.copy_(mask.sum().view(1), non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def how_many() -> int:
        copied.synchronize()
        return int(count[0])

    return order, how_many


def choose(
    logits: Tensor, ids: Tensor, bias: Tensor | None, transform: Transform, stats: Tensor, eps: float
) -> Choice:
    """Columns of logits [C, V] to keep; arguments as in `column_sums`."""
    largest, sums, totals = column_sums(logits, ids, bias, transform, stats)
    wanted = largest > eps
    wanted[ids.clamp(min=0)] = True  # an ignored token keeps column 0 too, which is harmless
    return Choice(*first_true(wanted), sums, totals)


def keep(choice: Choice, logits: Tensor) -> Kept | None:
    """The kept columns of the logits; None where they are so many that the block is better served dense."""
    C, V = logits.shape
    K = choice.how_many()
    _seen["kept"] += C * (K if K <= DENSE * V else V)
    _seen["all"] += logits.numel()
    if K > DENSE * V:
        return None
    columns = choice.order[:K]
    return Kept(columns, logits, choice.totals, choice.sums.index_fill(0, columns, 0))


def dropped_grad(totals: Tensor, coefficients: Tensor) -> Tensor:
    """Row sums [C] of dz over columns with these totals [2, C]."""
    prob, plogp = coefficients[Coefficient.PROB], coefficients[Coefficient.PLOGP]
    return (prob * totals[0] + plogp * totals[1]).to(coefficients.dtype)
