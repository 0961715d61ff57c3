"""Log-probability and entropy of a token under the softmax over its kept ids, from hidden states.

    hidden [N, H], weight [V, H], ids [N], kept sets of M ids in all  ->  logp, entropy [N]

Only the M kept logits are computed, as dot products of gathered rows: 2 M H flops and M H elements of the
weight in forward, twice as many in backward, in chunks of pairs (token, kept id). No [N, V] exists. Saved for
backward: the M raw logits. With P the softmax over a token's set and g the upstream gradients,

    dz[m] = g_logp ([id[m] = target] - P[m]) - g_entropy P[m] (log P[m] + entropy).

A target outside its set has logp -inf, whatever the logits are: it gets no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..autograd import NamedGrads
from ..softmax.rows import accumulator_dtype, slope_ref, transform_ref
from .engine import Gradients
from .engines import engine_context
from .head_ops import OpCall, head_grads, register_head_grads, register_head_op, save_call, saved_call
from .inputs import HeadInputs, NeedsGrad
from .kept_sets import KeptSets, kept_sets
from .plan import default_workspace_mib
from .product_grads import gradients_of, products_of
from .sharded_collectives import sum_of_ranks

# On a CPU the gathered rows of a chunk stay in the L2 cache.
CPU_CHUNK_BYTES = 2**20


class KeptStats(NamedTuple):
    """[N] each, in nats; 0 for ignored tokens."""

    logp: Tensor  # -inf where the target is outside its set
    entropy: Tensor  # of the softmax over the set; 0 for an empty one


class _Pairs(NamedTuple):
    """Pairs of a kept id and its token, [M]."""

    rows: Tensor  # of the token
    ids: Tensor  # the kept id
    raw: Tensor  # the raw logit without bias, in the accumulator's dtype; if sharded with bias, in fp64
    bias: Tensor | None  # of the kept id; None if raw has it

    @classmethod
    def of(cls, inputs: HeadInputs, sets: KeptSets, raw: Tensor) -> _Pairs:
        bias = None
        if inputs.bias is not None and inputs.options.shards is None:
            bias = inputs.bias[sets.ids].to(raw.dtype)
        return cls(sets.rows(), sets.ids, raw, bias)


class _LocalIds(NamedTuple):
    """Kept ids as rows of the weight on this rank, [M]."""

    ids: Tensor  # 0 where another rank has the id
    owned: Tensor | None  # bool; None: all

    @classmethod
    def of(cls, inputs: HeadInputs, ids: Tensor) -> _LocalIds:
        shards = inputs.options.shards
        return cls(inputs.local_ids(ids), None if shards is None else shards.owned(ids))

    def only_owned(self, x: Tensor, part: slice | None = None) -> Tensor:
        """x [M, ...], or of a part of the ids, with 0 where another rank has the id."""
        if self.owned is None:
            return x
        owned = self.owned if part is None else self.owned[part]
        return torch.where(owned.view(-1, *[1] * (x.dim() - 1)), x, 0.0)


def _chunks(inputs: HeadInputs, pairs: int, needs: NeedsGrad) -> Iterator[slice]:
    """Slices of the pairs. Two rows of H a pair, and their product, are in memory at a time."""
    hidden, options = inputs.hidden, inputs.options
    mib = options.workspace_mib or default_workspace_mib(hidden.device.type, weight_grad=needs.head)
    available = mib * 2**20 if hidden.is_cuda else min(mib * 2**20, CPU_CHUNK_BYTES)
    size = max(1, int(available) // (3 * hidden.shape[1] * accumulator_dtype(hidden.dtype).itemsize))
    for begin in range(0, pairs, size):
        yield slice(begin, begin + size)


def _gather(matrix: Tensor, index: Tensor, ignored: Tensor | None = None) -> Tensor:
    """Rows of a matrix in the accumulator's dtype; 0 for those that are ignored, which may hold NaN."""
    rows = matrix.index_select(0, index).to(accumulator_dtype(matrix.dtype))
    return rows if ignored is None else rows.masked_fill_(ignored[:, None], 0)


def _raw_logits(inputs: HeadInputs, rows: Tensor, ids: Tensor) -> Tensor:
    """hidden[rows] . weight[ids], [M] in the accumulator's dtype; a LoRA adapter's product is added.

    `_Pairs` says what it is for a sharded head.
    """
    hidden, weight = inputs.hidden, inputs.weight.to(inputs.hidden.dtype)
    shards = inputs.options.shards
    raw = hidden.new_empty(ids.numel(), dtype=accumulator_dtype(hidden.dtype))
    ignored, local = inputs.ids < 0, _LocalIds.of(inputs, ids)
    for part in _chunks(inputs, ids.numel() if weight.shape[0] else 0, NeedsGrad()):
        of_tokens = _gather(hidden, rows[part], ignored[rows[part]])
        raw[part] = of_tokens.mul_(_gather(weight, local.ids[part])).sum(1)
        if inputs.lora is not None:
            of_tokens = _gather(inputs.lora.hidden, rows[part])
            raw[part] += of_tokens.mul_(_gather(inputs.lora.weight, local.ids[part])).sum(1)
    low = inputs.options.logits_dtype
    raw = raw if low is None else raw.to(low).to(raw.dtype)
    if shards is None:
        return raw
    wide = raw.double()
    if inputs.bias is not None and weight.shape[0]:
        wide = wide + inputs.bias[local.ids]
    return sum_of_ranks(local.only_owned(wide), len(shards.rows), inputs.group)


class _Softmax(NamedTuple):
    """The softmax over each token's set, in fp64: sums over any number of ids have all digits of fp32."""

    logp: Tensor  # [M]
    is_target: Tensor  # [M] bool
    target_logp: Tensor  # [N], -inf where the target is not kept
    entropy: Tensor  # [N]

    @classmethod
    def of(cls, inputs: HeadInputs, pairs: _Pairs) -> _Softmax:
        rows, ids, raw, bias = pairs
        N = inputs.ids.numel()
        z = transform_ref(raw.double(), bias, inputs.options.transform)
        row_max = z.new_full((N,), -math.inf).scatter_reduce_(0, rows, z, "amax")
        # -inf for a set of masked logits alone: exp(-inf - 0) is 0
        row_max = torch.where(row_max == -math.inf, 0.0, row_max)
        shifted = z - row_max[rows]
        logp = shifted - z.new_zeros(N).index_add_(0, rows, shifted.exp()).log()[rows]
        is_target = ids == inputs.ids[rows]
        at_target = torch.where(is_target, logp, -math.inf)
        target_logp = z.new_full((N,), -math.inf).scatter_reduce_(0, rows, at_target, "amax")
        terms = torch.where(logp == -math.inf, 0.0, logp.exp() * logp)
        return cls(logp, is_target, target_logp, -z.new_zeros(N).index_add_(0, rows, terms))


def _stats(inputs: HeadInputs, needs: NeedsGrad, offsets: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """`KeptStats` as [2, N], and the raw logits [M]; needs are those of the backward pass."""
    sets, dtype = KeptSets(offsets, kept), accumulator_dtype(inputs.hidden.dtype)
    with engine_context(inputs):
        raw = _raw_logits(inputs, sets.rows(), kept)
    softmax = _Softmax.of(inputs, _Pairs.of(inputs, sets, raw))
    stats = torch.stack([softmax.target_logp, softmax.entropy])
    return torch.where(inputs.ids >= 0, stats, 0.0).to(dtype), raw


def _fake_stats(inputs, needs, offsets, kept):
    hidden, dtype = inputs.hidden, accumulator_dtype(inputs.hidden.dtype)
    raw = dtype if inputs.options.shards is None else torch.float64
    return hidden.new_empty(2, hidden.shape[0], dtype=dtype), hidden.new_empty(kept.shape[0], dtype=raw)


def _logit_grads(inputs: HeadInputs, pairs: _Pairs, grad: Tensor) -> Tensor:
    """d loss / d raw [M] for upstream gradients [2, N]."""
    softmax = _Softmax.of(inputs, pairs)
    counted = inputs.ids >= 0
    of_logp = torch.where(counted & (softmax.target_logp != -math.inf), grad[0], 0.0).double()[pairs.rows]
    of_entropy = torch.where(counted, grad[1], 0.0).double()[pairs.rows]
    p, finite = softmax.logp.exp(), softmax.logp.clamp(min=-1e30)  # 0 * -1e30 is 0, 0 * -inf NaN
    dz = of_logp * (softmax.is_target.double() - p)
    dz -= of_entropy * p * (finite + softmax.entropy[pairs.rows])
    slope = slope_ref(pairs.raw.double(), pairs.bias, inputs.options.transform)
    return (dz * slope).to(accumulator_dtype(inputs.hidden.dtype))


def _stats_grad(
    inputs: HeadInputs, needs: NeedsGrad, offsets: Tensor, kept: Tensor, grad: Tensor, raw: Tensor
) -> Gradients:
    """Gradients for the upstream gradient [2, N] of `KeptStats`. On a CPU each sum is in the order of the
    pairs."""
    shards, M = inputs.options.shards, kept.numel() if inputs.weight.shape[0] else 0
    pairs, local = _Pairs.of(inputs, KeptSets(offsets, kept), raw), _LocalIds.of(inputs, kept)
    rows, d_raw = pairs.rows, local.only_owned(_logit_grads(inputs, pairs, grad))
    ignored = inputs.ids < 0
    # W in the dtype in which the forward pass had it
    operands = [inputs.weight.to(inputs.hidden.dtype), *([] if inputs.lora is None else [inputs.lora.weight])]
    grads = []
    with engine_context(inputs):
        for product in products_of(inputs, operands, needs):
            d_states, d_weight = (
                torch.zeros(x.shape if need else 0, dtype=d_raw.dtype, device=raw.device)
                for x, need in ((product.states, product.states_grad), (product.weight, product.weight_grad))
            )
            for part in _chunks(inputs, M, needs):
                of_pairs, tokens = d_raw[part, None], rows[part]
                if product.states_grad:
                    of_ids = _gather(product.operand, local.ids[part]).mul_(of_pairs)
                    d_states.index_add_(0, tokens, local.only_owned(of_ids, part))
                if product.weight_grad:
                    of_tokens = _gather(product.states, tokens, ignored[tokens]).mul_(of_pairs)
                    d_weight.index_add_(0, local.ids[part], local.only_owned(of_tokens, part))
            if shards is not None and shards.reduces_hidden:
                d_states = sum_of_ranks(d_states, len(shards.rows), inputs.group)
            grads.append((d_states.to(product.states.dtype), d_weight.to(product.weight.dtype)))
        d_bias = d_raw.new_zeros(0 if inputs.bias is None or not needs.bias else len(inputs.bias))
        if d_bias.numel():
            d_bias.index_add_(0, local.ids, d_raw)
    return gradients_of(grads, d_bias if inputs.bias is None else d_bias.to(inputs.bias.dtype))


_kept_stats_grad = register_head_grads("kept_stats_grad", _stats_grad)


def _save(ctx, call: OpCall, output: tuple[Tensor, Tensor]) -> None:
    _, raw = output
    ctx.mark_non_differentiable(raw)
    ctx.set_materialize_grads(False)
    save_call(ctx, call, raw)


def _backward(ctx, saved: Sequence[Tensor], grad: Tensor | None, *_: None) -> NamedGrads:
    if grad is None:
        return {}
    (inputs, needs, sets), (raw,) = saved_call(ctx, saved)
    return head_grads(_kept_stats_grad(inputs, needs, *sets, grad, raw), needs)


_kept_stats = register_head_op(
    "kept_stats",
    _stats,
    _fake_stats,
    save=_save,
    backward=_backward,
    losses="linear_logprobs or linear_ppo_loss with kept sets",
)


def kept_stats(inputs: HeadInputs, kept: object) -> KeptStats:
    """Statistics of checked inputs, differentiable; `kept` and errors as in `kept_sets`."""
    sets = kept_sets(kept, inputs)
    table, _ = _kept_stats(inputs, inputs.needs_grad(), *sets)
    return KeptStats(*table.unbind())
