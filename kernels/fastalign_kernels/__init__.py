"""Kernels of fastalign: torch, triton and the native library of csrc/ only. `fastalign` hands these names
on."""

from .advantage import Advantages, gae, masked_whiten
from .head import (
    CrossEntropyStats,
    linear_cross_entropy,
    linear_cross_entropy_stats,
    linear_logprobs,
    linear_token_stats,
)
from .logits import TokenStats, cross_entropy, sum_by_sequence, token_logprobs, token_stats
from .plan import HeadPlan, plan_head
from .policy import PolicyLoss, ValueLoss, ppo_loss, value_loss
from .policy_head import linear_ppo_loss
from .preference import (
    PreferenceLoss,
    RewardLoss,
    UnpairedLoss,
    cpo_loss,
    dpo_loss,
    kto_kl,
    kto_loss,
    orpo_loss,
    reward_loss,
    simpo_loss,
)
from .sampling import Sample, sample
from .sequence_head import LinearPreferenceLoss, LinearUnpairedLoss, linear_dpo_loss, linear_kto_loss
from .tail import kept_share
from .tail_report import TailReport, tail_report

__all__ = [
    "Advantages",
    "CrossEntropyStats",
    "HeadPlan",
    "LinearPreferenceLoss",
    "LinearUnpairedLoss",
    "PolicyLoss",
    "PreferenceLoss",
    "RewardLoss",
    "Sample",
    "TailReport",
    "TokenStats",
    "UnpairedLoss",
    "ValueLoss",
    "cpo_loss",
    "cross_entropy",
    "dpo_loss",
    "gae",
    "kept_share",
    "kto_kl",
    "kto_loss",
    "linear_cross_entropy",
    "linear_cross_entropy_stats",
    "linear_dpo_loss",
    "linear_kto_loss",
    "linear_logprobs",
    "linear_ppo_loss",
    "linear_token_stats",
    "masked_whiten",
    "orpo_loss",
    "plan_head",
    "ppo_loss",
    "reward_loss",
    "sample",
    "simpo_loss",
    "sum_by_sequence",
    "tail_report",
    "token_logprobs",
    "token_stats",
    "value_loss",
]
