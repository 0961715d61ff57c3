"""Inputs for the tail-compensated backward pass, and its formula in fp64."""

import torch
from torch import Tensor

N, H, V = 41, 16, 301


EPS = 2**-10


def make(dtype: torch.dtype = torch.float64, peak: float = 2.5, seed: int = 0) -> dict[str, Tensor]:
    """A trained-like head: each token's hidden state points at its id, and at a few others'."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, V, (N,), generator=generator)
    hidden = peak * (weight[ids] + 0.5 * torch.randn(N, H, generator=generator, dtype=torch.float64)) / 2
    ids[[3, 17]] = -100
    bias = 0.1 * torch.randn(V, generator=generator, dtype=torch.float64)
    tensors = {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "bias": bias.to(dtype)}
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()} | {"ids": ids}


LEAVES = ("hidden", "weight", "bias")


def gradients(loss: Tensor, given: dict[str, Tensor], names: tuple[str, ...] = LEAVES) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, [given[name] for name in names])
