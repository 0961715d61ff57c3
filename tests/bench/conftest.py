"""Methods of a tiny benchmark case."""

import pytest
import torch
from torch import Tensor

from bench.core.operation import EAGER, OURS, Absent, Forward
from bench.methods import cross_entropy as methods
from bench.methods.table import OPERATIONS


@pytest.fixture
def three_methods(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A table with ours, PyTorch, one that drops a tenth of a gradient, one that breaks and one that is
    absent; counts calls."""
    calls = {"wrong": 0}

    class Dropping(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits: Tensor) -> Tensor:
            return logits.clone()

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            return grad * (torch.arange(grad.shape[-1]) % 10 > 0)

    def wrong(logits: Tensor, ids: Tensor) -> dict[str, Tensor]:
        calls["wrong"] += 1
        return {"loss": torch.nn.functional.cross_entropy(Dropping.apply(logits), ids)}

    def broken(logits: Tensor, ids: Tensor) -> dict[str, Tensor]:
        raise RuntimeError("0 active drivers\nsecond line")

    def absent(device: str) -> Forward:
        raise Absent("on holiday")

    table = {key: methods.CROSS_ENTROPY.methods[key] for key in (OURS, EAGER)}
    operation = methods.CROSS_ENTROPY._replace(
        methods={**table, "wrong": lambda _: wrong, "broken": lambda _: broken, "absent": absent}
    )
    monkeypatch.setitem(OPERATIONS, "cross_entropy", operation)
    return calls
