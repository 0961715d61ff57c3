"""Stages of preferences, their runs, and log-probabilities in plain PyTorch."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from fastalign.data import Tokenized
from fastalign.stages import batches, dpo, kto, reward
from fastalign.stages.config import TrainConfig

STAGES: dict[str, tuple[ModuleType, type[TrainConfig], str]] = {
    "reward": (reward, reward.RewardConfig, "pairs"),
    "dpo": (dpo, dpo.DPOConfig, "pairs"),
    "kto": (kto, kto.KTOConfig, "judged"),
}


Make = Callable[..., Any]


def run(config: Any) -> dict[str, float]:
    stage = next(module for module, kind, _ in STAGES.values() if type(config) is kind)
    result: dict[str, float] = stage.run(config)
    return result


def step_rows(config: Any, rows: list[Any], step: int) -> list[Any]:
    return [
        rows[n]
        for n in batches.rows_of_step(step, rows=len(rows), batch_size=config.batch_size, seed=config.seed)
    ]


def plain_logps(model: Any, sequences: list[Tokenized]) -> torch.Tensor:
    """Each sequence alone, from logits."""
    sums = []
    for ids, trained in sequences:
        logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        sums.append(sum(logp[place - 1, ids[place]] for place in range(1, len(ids)) if trained[place]))
    return torch.stack(sums)
