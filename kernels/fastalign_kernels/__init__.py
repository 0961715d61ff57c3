"""Kernels of fastalign: torch, triton and the native library of csrc/ only. `fastalign` hands these names on."""

from .head import (
    CrossEntropyStats,
    linear_cross_entropy,
    linear_cross_entropy_stats,
    linear_logprobs,
    linear_token_stats,
)
from .logits import TokenStats, cross_entropy, sum_by_sequence, token_logprobs, token_stats
from .sampling import Sample, sample
from .sweep import HeadPlan, plan_head

__all__ = [
    "CrossEntropyStats",
    "HeadPlan",
    "Sample",
    "TokenStats",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_cross_entropy_stats",
    "linear_logprobs",
    "linear_token_stats",
    "plan_head",
    "sample",
    "sum_by_sequence",
    "token_logprobs",
    "token_stats",
]
