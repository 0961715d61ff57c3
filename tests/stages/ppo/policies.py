"""Policies, prompts and scores for PPO's tests."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import GPT2LMHeadModel

from fastalign.actor_critic import ActorCritic
from fastalign.causal_lm import fuse_head
from fastalign.data import Prompt
from fastalign.stages.ppo import PPOConfig

Make = Callable[..., PPOConfig]


# A step by hand


def plain(model: Any, experience: Any, temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A row at a time, from logits: log-probabilities and entropies [B, R], and the hidden states before each
    token [B, R, H]."""
    logps, entropies, states = [], [], []
    for prompt, ids in zip(experience.prompts, experience.completions, strict=True):
        hidden = model.transformer(torch.tensor([prompt + ids])).last_hidden_state[0, len(prompt) - 1 : -1]
        table = (model.lm_head(hidden) / temperature).log_softmax(-1)
        logps.append(table.gather(1, torch.tensor(ids)[:, None])[:, 0])
        entropies.append(-(table.exp() * table).sum(1))
        states.append(hidden)
    logp, entropy, hidden = (
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) for rows in (logps, entropies, states)
    )
    return logp, entropy, hidden


def actor_critic(base: str) -> ActorCritic:
    """The tiny model with a shared backbone, in fp64 and evaluation mode, that is, without dropout."""
    return ActorCritic(fuse_head(GPT2LMHeadModel.from_pretrained(base, dtype=torch.float64))).eval()


PROMPTS = [Prompt([5 + n, *range(7, 7 + n)], {}) for n in range(8)]


ENDS: dict[str, Any] = {"eos_id": 0, "pad_id": 1}


def lengths(prompts: Any, completions: Any) -> torch.Tensor:
    """A score that anybody can compute."""
    return torch.tensor([float(sum(token % 7 for token in ids)) for ids in completions])
