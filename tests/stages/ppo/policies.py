"""Policies, prompts and scores for PPO's tests."""

from collections.abc import Callable
from typing import Any

import torch

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
