"""Stages of preferences, their runs, and log-probabilities in plain PyTorch."""

from collections.abc import Callable
from pathlib import Path
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


# Options under which TRL's trainers take our steps, and theirs.
OURS_AS_TRL: dict[str, Any] = {
    "max_steps": 3,
    "dtype": "float32",
    "schedule": "constant",
    "adam_eps": 1e-6,
    "max_grad_norm": 100.0,
}


def trl_settings(config: Any, folder: Path, rows: int) -> dict[str, Any]:
    """TRL's arguments for the same steps of so many rows."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": rows,
        "max_steps": config.max_steps,
        "max_length": 64,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "adam_epsilon": config.adam_eps,
        "max_grad_norm": config.max_grad_norm,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
