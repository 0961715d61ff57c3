"""Runs whose peak memory is measured beside its estimate (tests/stages/test_estimate.py)."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastalign.stages import dpo, pretrain, sft
from fastalign.stages.config import TrainConfig

STAGES: Mapping[str, tuple[type[TrainConfig], Callable[[Any], object]]] = {
    "pretrain": (pretrain.PretrainConfig, pretrain.run),
    "sft": (sft.SFTConfig, sft.run),
    "dpo": (dpo.DPOConfig, dpo.run),
}


def prepare(stage: str, fields: str) -> Callable[[], object]:
    """A run of a stage, its fields as JSON; a target of fastalign.measure.peak_memories."""
    torch.set_num_threads(1)
    kind, run = STAGES[stage]
    return lambda: run(kind(**json.loads(fields)))
