"""Tokens and values with options for the policy losses, and what a test compares."""

from __future__ import annotations

import torch

NAN, INF = float("nan"), float("inf")


FULL = {"entropy_coefficient": 0.1, "kl_coefficient": 0.3, "clip_high": 0.4, "dual_clip": 1.3}


def tokens(dtype=torch.float64, shape=(5, 23), seed=0, device="cpu", spread=0.4):
    """logp and entropy with a gradient, what goes with them, and a ragged mask with an empty row; garbage
    stands outside of it."""
    generator = torch.Generator().manual_seed(seed)
    random = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name in ("logp", "old_logp", "a", "entropy", "ref")
    }
    mask = torch.rand(shape, generator=generator) > 0.3
    if len(shape) == 2:
        mask[1:2], mask[2:3] = False, True
    random["logp"] = -2 + random["logp"]
    tensors = {
        "logp": random["logp"],
        "old_logp": random["logp"] + spread * random["old_logp"],
        "advantages": random["a"],
        "entropy": random["entropy"].abs(),
        "reference_logp": random["logp"] + spread * random["ref"],
    }
    for tensor, garbage in zip(tensors.values(), (NAN, INF, NAN, -INF, 1e30)):
        tensor[~mask] = garbage
    tensors = {name: tensor.to(dtype).to(device) for name, tensor in tensors.items()}
    tensors["logp"].requires_grad_()
    tensors["entropy"].requires_grad_()
    return tensors | {"mask": mask.to(device)}


def values(dtype=torch.float64, shape=(5, 23), seed=0, device="cpu"):
    given = tokens(torch.float64, shape, seed, device)
    tensors = {
        "values": given["logp"].detach(),
        "old_values": given["old_logp"],
        "returns": given["advantages"],
    }
    return {name: tensor.to(dtype) for name, tensor in tensors.items()} | {"mask": given["mask"]}


def gradients(loss, given, upstream=-1.7):
    trained = [x for x in given.values() if x.requires_grad]
    return torch.autograd.grad(upstream * loss, trained, retain_graph=True)
