"""The head's engine for a GPU's rows of a sharded weight: any engine for whole weights, and two collectives.

The statistics of all tokens are one all-gather, and dX is one all-reduce, whatever the local engine's chunks
are: ranks with uneven shards may run different engines. The all-reduce begins when dX is queued and runs
beside the GEMM of dW, but for engines of vocabulary slices, which make dX last.

An engine for whole weights may have kept its own softmax, P_r, and not the logits. The softmax of the whole
row is then q_r P_r. With log q_r its share of the row's mass,

    P (prob + plogp log P) = P_r (q_r (prob + plogp log q_r) + q_r plogp log P_r),

so the local engine takes its own table with the coefficients on the right. On a CPU, and with tail_eps,
chunks of token tiles take the table of the whole row themselves (chunks.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..softmax.rows import Coefficient, Stat
from .engine import Engine, Gradients, empty_gradients, empty_stats, hidden_grad_dtype
from .inputs import HeadInputs, NeedsGrad
from .sharded import Shards, stats_of_no_rows
from .sharded_collectives import Ranks, RankSum, whole_stats

# q below e^-LOWEST_SHARE is 0 in fp32; the product of a smaller log q and a coefficient might overflow.
LOWEST_SHARE = 1e4


def local_inputs(inputs: HeadInputs) -> HeadInputs:
    """The inputs of a call on this rank's rows alone; its dX is in the accumulator's dtype."""
    options = inputs.options._replace(shards=None, wide=True)
    return inputs._replace(ids=inputs.local_ids(inputs.ids), options=options, group="")


class ShardedEngine(Engine):
    """The engine of a sharded weight; see engine.py. What it saves is the table of this rank's logits, and
    what the local engine saves."""

    def __init__(self, local: Engine) -> None:
        self.local = local

    def statistics(self, inputs: HeadInputs, needs: NeedsGrad) -> tuple[Tensor, list[Tensor]]:
        local_stats, saved = self._local_statistics(inputs, needs)
        lean = inputs.options.lean
        stats = whole_stats(local_stats, inputs.ids, _shards(inputs), inputs.group, lean=lean)
        return stats, [local_stats, *saved] if any(needs) else []

    def empty_saved(self, inputs: HeadInputs, needs: NeedsGrad) -> list[Tensor]:
        if not any(needs):
            return []
        saved = self.local.empty_saved(local_inputs(inputs), needs) if inputs.weight.shape[0] else []
        return [empty_stats(inputs), *saved]

    def gradients(
        self, inputs: HeadInputs, stats: Tensor, saved: list[Tensor], coefficients: Tensor, needs: NeedsGrad
    ) -> Gradients:
        """The gradients of this rank's rows.

        Without `saved`, as in a second backward pass, this rank's statistics are recomputed.
        """
        local, shards = local_inputs(inputs), _shards(inputs)
        if not saved:
            saved = [self._local_statistics(inputs, NeedsGrad())[0]]
        local_stats, *rest = saved
        ranks = Ranks(-1, len(shards.rows), inputs.group)
        begun: list[RankSum] = []

        def begin_sum(hidden: Tensor) -> None:
            begun.append(RankSum(hidden, ranks))
            begun[0].start()

        if inputs.weight.shape[0]:
            of_rank = local_coefficients(coefficients, inputs.ids, stats, local_stats, shards)
            self.local.hidden_done = begin_sum if shards.reduces_hidden else None
            grads = self.local.gradients(local, local_stats, rest, of_rank, needs)
        else:
            grads = Gradients(*(grad.zero_() for grad in empty_gradients(local, needs)))
        hidden, lora_hidden = grads.hidden, grads.lora_hidden
        if shards.reduces_hidden:
            hidden_sum = begun[0] if begun else RankSum(hidden.contiguous(), ranks)
            hidden, lora_hidden = hidden_sum.finish(), RankSum(lora_hidden.contiguous(), ranks).finish()
        return grads._replace(hidden=hidden.to(hidden_grad_dtype(inputs)), lora_hidden=lora_hidden)

    def _local_statistics(self, inputs: HeadInputs, needs: NeedsGrad) -> tuple[Tensor, list[Tensor]]:
        if inputs.weight.shape[0]:
            return self.local.statistics(local_inputs(inputs), needs)
        return stats_of_no_rows(inputs.ids.numel(), empty_stats(inputs)), []


def local_coefficients(
    coefficients: Tensor, ids: Tensor, stats: Tensor, local_stats: Tensor, shards: Shards
) -> Tensor:
    """The gradient kernel's [4, N] beside the table of this rank's logits, from those of the whole row."""
    log_share = (local_stats[Stat.MAX] - stats[Stat.MAX]) + (local_stats[Stat.LOGSUM] - stats[Stat.LOGSUM])
    log_share = log_share.clamp(min=-LOWEST_SHARE)
    share = log_share.exp()
    local = shards.local_coefficients(coefficients, ids)
    plogp = local[Coefficient.PLOGP].clone()
    local[Coefficient.PROB] = share * (local[Coefficient.PROB] + plogp * log_share)
    local[Coefficient.PLOGP] = share * plogp
    return torch.where(ids >= 0, local, 0.0)


def _shards(inputs: HeadInputs) -> Shards:
    shards = inputs.options.shards
    assert shards is not None
    return shards
