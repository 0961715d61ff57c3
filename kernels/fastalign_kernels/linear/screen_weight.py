"""A head's weight in 8 bits, for screened logits: coded once for each version of the weight.

What is coded depends on the weight alone, never on the hidden states: a call's result does not depend on the
calls before it, nor on the other tokens in it. The basis along which products are exact (gemm_int8.py) holds
the directions in which rows of the weight are longest. The columns of a softmax's tail share them, so that an
error along them would not average out.

Bytes: one read of the weight for its hashes in every call; for its codes one more, and (H + 72) V written. On
one core, coding SmolLM2's weight takes 4 to 5 % of the fp32 GEMM of 2048 tokens, and hashing it 0.8 %.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..gemm_int8 import LOW, CodedRows, Coding, code_rows, digest_rows, rotate_ref, rotated_coding
from ..namespace import ops

SAMPLED_ROWS = 1024  # of the weight, for its basis
ROUNDS = 2  # of subspace iteration
MOST_WEIGHTS = 4  # that are kept coded


class ScreenedWeight(NamedTuple):
    """A weight's codes, and the lengths that bound a logit's error."""

    rows: CodedRows
    largest_length: float  # over the rows, of what lies outside of the basis
    largest_residual: float
    mean_length: float
    mean_residual: float


class _Kept(NamedTuple):
    storage: StorageWeakRef
    hashes: Tensor  # [V] int64
    coded: ScreenedWeight


_kept: OrderedDict[tuple[object, ...], _Kept] = OrderedDict()


def screened_weight(weight: Tensor) -> ScreenedWeight:
    """The codes of weight [V, H]: those kept of this version of it, or new ones.

    A version misses some changes: in-place operations on `weight.data` keep it, and so does FSDP2,
    which gathers each step's weight into the same memory. So a hash of each row is compared too. An inference
    tensor has no version, and is coded anew.
    """
    if weight.is_inference():
        return code_weight(weight)
    storage = StorageWeakRef(weight.untyped_storage())
    key = (
        *(storage.cdata, weight.storage_offset(), weight._version),
        *(weight.dtype, *weight.shape, *weight.stride()),
    )
    hashes = digest_rows(weight.detach())
    kept = _kept.get(key)
    if kept is not None and not kept.storage.expired() and torch.equal(kept.hashes, hashes):
        _kept.move_to_end(key)
        return kept.coded
    for old in [old for old, entry in _kept.items() if entry.storage.expired() or _same_memory(old, key)]:
        del _kept[old]
    coded = code_weight(weight)
    _kept[key] = _Kept(storage, hashes, coded)
    while len(_kept) > MOST_WEIGHTS:
        _kept.popitem(last=False)
    return coded


def forget_weights() -> None:
    """Drop the codes of all weights."""
    _kept.clear()


def _same_memory(one: tuple[object, ...], other: tuple[object, ...]) -> bool:
    return one[:2] == other[:2]


def code_weight(weight: Tensor) -> ScreenedWeight:
    """The codes of weight [V, H]."""
    weight = weight.detach()
    coding = rotated_coding(weight.shape[1])
    rows = code_rows(weight, coding._replace(basis=longest_directions(weight, coding)), left=False)
    residuals, lengths = rows.residuals.double(), rows.lengths.double()
    return ScreenedWeight(
        rows,
        float(lengths.amax()),
        float(residuals.amax()),
        float(lengths.square().mean().sqrt()),
        float(residuals.square().mean().sqrt()),
    )


def longest_directions(weight: Tensor, coding: Coding) -> Tensor:
    """A basis [LOW, width] that spans what is nearly the longest part of sampled rows of the weight.

    By subspace iteration in our own GEMM, whose bits do not depend on the number of threads. Where the weight
    has NaN or infinities the basis is arbitrary.
    """
    V, H = weight.shape
    rows = weight[:: max(1, V // SAMPLED_ROWS)][:SAMPLED_ROWS].float()
    rows = rows.nan_to_num(0.0, 0.0, 0.0)
    rows = rows / rows.abs().amax().clamp(min=1e-30)
    basis = torch.zeros(LOW, H)
    basis[: rows.shape[0]] = rows[:: max(1, rows.shape[0] // LOW)][:LOW]
    for _ in range(ROUNDS):
        basis = orthonormal(basis)
        along = torch.empty(rows.shape[0], LOW)
        _gemm(rows, basis.t(), along)
        _gemm(along.t(), rows, basis)
    return orthonormal(rotate_ref(orthonormal(basis), coding))


def _gemm(left: Tensor, right: Tensor, out: Tensor) -> None:
    ops.gemm(left, right, out, False, None, None)


def orthonormal(rows: Tensor) -> Tensor:
    """Orthonormal rows by Gram and Schmidt's method, run twice; a row that the earlier ones span becomes
    zeros."""
    basis = rows.double()
    for i, row in enumerate(basis):
        length = row.norm()
        for _ in range(2):
            for before in basis[:i]:
                row = row - (row * before).sum() * before
        left = row.norm()
        basis[i] = row / left if left > 1e-6 * length else 0.0
    return basis.float()
