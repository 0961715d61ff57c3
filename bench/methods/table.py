"""Every operation of the suite by name."""

from __future__ import annotations

from ..core import smollm2
from .cross_entropy import CROSS_ENTROPY, LINEAR_CROSS_ENTROPY, LINEAR_LOGPROBS, TOKEN_STATS
from .distillation import DISTILLATION
from .lora import LORA
from .pairs import PAIRS
from .policy import POLICY
from .ppo import PPO
from .preference import PREFERENCE
from .sampling import SAMPLING
from .screen import SCREEN
from .steps import STEPS
from .tail import TAIL

OPERATIONS = {
    "linear_cross_entropy": LINEAR_CROSS_ENTROPY,
    "linear_cross_entropy, SmolLM2's softmax": LINEAR_CROSS_ENTROPY._replace(inputs=smollm2.head_inputs),
    "linear_logprobs": LINEAR_LOGPROBS,
    "token_stats": TOKEN_STATS,
    "cross_entropy": CROSS_ENTROPY,
    **DISTILLATION,
    **LORA,
    **PREFERENCE,
    **PAIRS,
    **POLICY,
    **SAMPLING,
    **SCREEN,
    **PPO,
    **STEPS,
    **TAIL,
}
