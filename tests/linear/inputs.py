"""Inputs and gradients for the tests of the head."""

import torch

from fastalign_kernels.linear.head_ops import OpCall
from fastalign_kernels.linear.inputs import HeadInputs, HeadOptions, NeedsGrad

ALL_GRADS = NeedsGrad(hidden=True, weight=True, bias=True)


def make(device, dtype=torch.float64, N=37, H=19, V=123, scale=0.5, seed=0):
    """hidden, weight, ids (some -100), bias; half of the tokens are peaked: their hidden state is their
    target's row of the weight."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, V, (N,), generator=generator)
    hidden = scale * torch.randn(N, H, generator=generator, dtype=torch.float64)
    hidden[: N // 2] += weight[ids[: N // 2]]
    ids[3::7] = -100
    bias = torch.randn(V, generator=generator, dtype=torch.float64)
    return (
        *(t.to(dtype).to(device).requires_grad_() for t in (hidden, weight)),
        ids.to(device),
        bias.to(dtype).to(device).requires_grad_(),
    )


def grads_of(output, inputs, upstream=None):
    return torch.autograd.grad(output, inputs, upstream if upstream is not None else torch.ones_like(output))


def op_arguments(tensors, *rest, options=HeadOptions(), needs=ALL_GRADS):  # noqa: B008  a tuple
    """What an op on the head takes; tensors are hidden, weight, ids of ignored tokens -1, and bias."""
    hidden, weight, ids, bias = tensors
    return OpCall(HeadInputs(hidden, weight, ids, bias, options=options), needs, rest).arguments()
