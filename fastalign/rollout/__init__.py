"""Generation for reinforcement learning: tokens with the log-probabilities that their policy gave them."""

from .generation import Rollout, generate
from .transformers_generate import RolloutOutput, custom_generate

__all__ = ["Rollout", "RolloutOutput", "custom_generate", "generate"]
