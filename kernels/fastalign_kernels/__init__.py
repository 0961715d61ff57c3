"""Kernels of fastalign: torch, triton and the native library of csrc/ only. `fastalign` hands these names
on."""

from .linear.cross_entropy import linear_cross_entropy
from .linear.cross_entropy_stats import CrossEntropyStats, linear_cross_entropy_stats
from .linear.distillation import linear_distillation_loss
from .linear.dpo import LinearPreferenceLoss, linear_dpo_loss
from .linear.head_plan import HeadPlan
from .linear.kto import LinearUnpairedLoss, linear_kto_loss
from .linear.logprobs import linear_logprobs
from .linear.low_rank import LowRank
from .linear.plan import plan_head
from .linear.ppo import linear_ppo_loss
from .linear.screen import ScreenCounts, screen_counts
from .linear.screen_report import ScreenReport, screen_report
from .linear.tail_columns import kept_share
from .linear.tail_report import TailReport, tail_report
from .linear.token_stats import linear_token_stats
from .logits import TokenStats, cross_entropy, token_logprobs, token_stats
from .policy.advantages import Advantages, gae, masked_whiten
from .policy.losses import PolicyLoss, ValueLoss, ppo_loss, value_loss
from .preference.losses import cpo_loss, dpo_loss, kto_kl, kto_loss, orpo_loss, reward_loss, simpo_loss
from .preference.results import PreferenceLoss, RewardLoss, UnpairedLoss
from .sampling import Sample, sample
from .sequences import sum_by_sequence

__all__ = [
    "Advantages",
    "CrossEntropyStats",
    "HeadPlan",
    "LinearPreferenceLoss",
    "LinearUnpairedLoss",
    "LowRank",
    "PolicyLoss",
    "PreferenceLoss",
    "RewardLoss",
    "Sample",
    "ScreenCounts",
    "ScreenReport",
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
    "linear_distillation_loss",
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
    "screen_counts",
    "screen_report",
    "simpo_loss",
    "sum_by_sequence",
    "tail_report",
    "token_logprobs",
    "token_stats",
    "value_loss",
]
