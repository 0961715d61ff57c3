"""How many files a reader opens from a public function to its first GEMM."""

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign_kernels import (
    linear_cross_entropy,
    linear_dpo_loss,
    linear_kto_loss,
    linear_ppo_loss,
    linear_token_stats,
)
from fastalign_kernels.linear import chunks

REGISTRATION = {"head_ops.py", "autograd.py"}  # hand every op's arguments to its body
HIDDEN, WEIGHT, IDS = torch.ones(2, 3, 4, requires_grad=True), torch.ones(5, 4), torch.zeros(2, 3).long()
WEIGHT.requires_grad_()
SEQUENCES, TOKENS = torch.zeros(2), torch.zeros(2, 3)
KTO: dict[str, Any] = {"desirable": SEQUENCES > 0, "kl": torch.tensor(0.0), "reference_logps": SEQUENCES}
PPO: dict[str, Any] = {"old_logp": TOKENS, "advantages": TOKENS, "mask": IDS >= 0}
CALLS: dict[str, Callable[..., object]] = {
    "linear_cross_entropy": linear_cross_entropy,
    "linear_token_stats": linear_token_stats,
    "linear_dpo_loss": partial(linear_dpo_loss, reference_logps=SEQUENCES),
    "linear_kto_loss": partial(linear_kto_loss, **KTO),
    "linear_ppo_loss": partial(linear_ppo_loss, **PPO),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_gemm_is_at_most_four_files_away(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    paths: list[set[str]] = []
    mm = chunks.mm

    def recording(*factors: Tensor) -> None:
        files = (Path(frame.filename) for frame in inspect.stack(context=0))
        paths.append({file.name for file in files if "fastalign_kernels" in file.parts})
        mm(*factors)

    monkeypatch.setattr(chunks, "mm", recording)
    CALLS[name](HIDDEN, WEIGHT, IDS)
    assert len(paths[0] - REGISTRATION) <= 4, paths[0]
