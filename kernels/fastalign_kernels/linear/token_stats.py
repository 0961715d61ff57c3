"""Statistics of each token from hidden states, for any upstream gradient (head_stats.py)."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from .. import checks
from ..logits import TokenStats, stats_of
from .head_stats import head_stats
from .inputs import HeadArguments, head_inputs, head_keywords, head_options


@head_keywords
def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None = None,
    *,
    entropy: bool = True,
    **head: Unpack[HeadArguments],
) -> TokenStats:
    """Log-probability, entropy and logsumexp of each position, differentiable, and top-1.

    Costs 1 GEMM without gradients, 3 with a frozen weight, 4 when training; on a GPU 2 and 3 for tokens whose
    softmax the workspace holds.

    Args:
        hidden, weight, ids, bias: [..., H], [V, H], [...], [V], as in `linear_cross_entropy`.
        entropy: False leaves that field None.
        **head: `HeadArguments` documents these keywords.

    Returns:
        [...] each: logp, entropy, lse in nats, fp32 (fp64 for fp64 inputs); top1 bool. Ignored positions are
        0 / False and get no gradient.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range.
    """
    checks.flags(entropy=entropy)
    options = head_options(linear_token_stats, head)
    inputs = head_inputs(hidden, weight, ids, bias, options)
    return stats_of(head_stats(inputs if entropy else inputs.lean()), ids.shape, entropy)
