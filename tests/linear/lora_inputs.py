"""Inputs of the head with a LoRA adapter, and every loss of the head as a function of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign_kernels import (
    linear_cross_entropy,
    linear_dpo_loss,
    linear_kto_loss,
    linear_logprobs,
    linear_ppo_loss,
    linear_token_stats,
)
from fastalign_kernels.linear.distillation import linear_distillation_loss
from fastalign_kernels.linear.token_outputs import linear_token_outputs

R, T, H, V = 4, 5, 6, 37  # rows, tokens of each
N = R * T
SCALE = 0.7


class Given(NamedTuple):
    """A head and its adapter."""

    hidden: Tensor  # [R, T, H], NaN where ignored
    weight: Tensor
    bias: Tensor
    A: Tensor
    B: Tensor

    def merged(self) -> Tensor:
        """W + s B A, which no call with lora= forms."""
        return self.weight + SCALE * self.B @ self.A

    def trained(self, *, frozen: bool) -> list[Tensor]:
        """Tensors that get a gradient."""
        return [self.hidden, self.A, self.B] if frozen else list(self)


def make(r: int, dtype: torch.dtype = torch.float64, *, device: str = "cpu", frozen: bool = False) -> Given:
    generator = torch.Generator().manual_seed(r)
    shapes = {"hidden": (R, T, H), "weight": (V, H), "bias": (V,), "A": (r, H), "B": (V, r)}
    tensors = {
        name: torch.randn(*shape, generator=generator).to(device, dtype) for name, shape in shapes.items()
    }
    tensors["B"] /= r**0.5
    tensors["hidden"][ids(device) < 0] = torch.nan
    given = Given(**tensors)
    for tensor in given.trained(frozen=frozen):
        tensor.requires_grad_()
    return given


def ids(device: str = "cpu") -> Tensor:
    """[R, T], of which some are ignored."""
    found = torch.randint(V, (R, T), generator=torch.Generator().manual_seed(1))
    found[:, 0], found[2, 3] = -100, -100
    return found.to(device)


def _numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def _kept() -> tuple[Tensor, Tensor]:
    """Each token keeps its own id and six others."""
    tokens: list[int] = ids().flatten().tolist()
    sets = [sorted({max(0, token), *range(number, number + 6)}) for number, token in enumerate(tokens)]
    sizes = torch.tensor([0, *(len(s) for s in sets)])
    return sizes.cumsum(0), torch.tensor([i for s in sets for i in s])


def _teacher() -> dict[str, Any]:
    top = _numbers(R, T, V).log_softmax(-1).topk(3)
    return {"teacher_ids": torch.where(ids()[..., None] < 0, -100, top.indices), "teacher_logp": top.values}


def _policy() -> dict[str, Any]:
    return {"ids": ids(), "old_logp": _numbers(R, T) - 3, "advantages": _numbers(R, T), "mask": ids() >= 0}


def _table(stats: Any) -> Tensor:
    return torch.stack([stats.logp, stats.entropy, stats.lse])


def _outputs(found: Any) -> Tensor:
    return torch.stack([found.logp, found.entropy])


PACKED: dict[str, Any] = {"cu_seqlens": torch.arange(0, N + 1, T), "reference_logps": _numbers(R) - 9}
KTO: dict[str, Any] = {"desirable": torch.tensor([True, False, True, False]), "kl": torch.tensor(0.1)}

# (hidden, weight, bias, **head) -> a tensor with a gradient
LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross-entropy": lambda h, w, b, **k: linear_cross_entropy(h, w, ids(), b, label_smoothing=0.1, **k),
    "cross-entropy of tokens": lambda h, w, b, **k: linear_cross_entropy(
        h, w, ids(), b, reduction="none", **k
    ),
    "log-probabilities": lambda h, w, b, **k: linear_logprobs(h, w, ids(), b, **k),
    "kept sets": lambda h, w, b, **k: linear_logprobs(h, w, ids(), b, kept=_kept(), **k),
    "statistics": lambda h, w, b, **k: _table(linear_token_stats(h, w, ids(), b, **k)),
    "DPO": lambda h, w, b, **k: linear_dpo_loss(h, w, ids(), b, reference_logps=_numbers(R) - 9, **k).loss,
    "DPO, packed": lambda h, w, b, **k: (
        linear_dpo_loss(h.flatten(0, 1), w, ids().flatten(), b, **PACKED, **k).loss
    ),
    "KTO": lambda h, w, b, **k: (
        linear_kto_loss(h, w, ids(), bias=b, reference_logps=_numbers(R) - 9, **KTO, **k).loss
    ),
    "PPO": lambda h, w, b, **k: linear_ppo_loss(h, w, bias=b, entropy_coefficient=0.1, **_policy(), **k).loss,
    "distillation": lambda h, w, b, **k: linear_distillation_loss(h, w, bias=b, **_teacher(), **k),
    "outputs of tokens": lambda h, w, b, **k: _outputs(
        linear_token_outputs(h, w, ids(), b, entropy=True, **k)
    ),
}
NO_TAIL = ("kept sets", "distillation")  # their gradients are exact alone
