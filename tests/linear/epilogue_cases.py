"""Inputs of the engines of gpu/epilogue.py, their fp64 specification, and how near to it they must be."""

import torch

from fastalign_kernels.linear.gpu import epilogue
from fastalign_kernels.linear.inputs import NeedsGrad
from fastalign_kernels.linear.options import HeadOptions
from fastalign_kernels.softmax.rows import Stat, coefficients, row_grad_ref, row_stats_ref

TILES = epilogue.Tiles() if torch.cuda.is_available() else epilogue.Tiles(bm=16, bn=32, bk=16, group=2)
ALL = NeedsGrad(hidden=True, weight=True)
OPTIONS = {
    "plain": HeadOptions(),
    "scale": HeadOptions(logit_scale=0.7, temperature=1.3),
    "softcap": HeadOptions(softcap=5.0),
}


# The interpreter's products are exact in fp32. A GPU's tl.dot would round fp32 factors to TF32, so that the
# engine serves 16 bits alone.
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32


# The interpreter takes as few as it can. A GPU takes as many as the engine serves: where a token decides an
# element of dW, its second rounding shows.
TOKENS = 1037 if torch.cuda.is_available() else 37


def make(device, dtype=DTYPE, N=TOKENS, H=40, V=123, scale=0.3, ignored=True):
    """hidden, weight, ids; half of the tokens are sure of their id. Ignored tokens hold NaN."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64) * scale
    ids = torch.randint(0, V, (N,), generator=generator)
    hidden = torch.randn(N, H, generator=generator, dtype=torch.float64)
    hidden[: N // 2] += weight[ids[: N // 2]] / scale
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    if ignored:
        ids[::3], hidden[::3] = -1, torch.nan
    return hidden.to(device), weight.to(device), ids.to(device)


def upstream(inputs, *statistics):
    """Gradients [7, N] of these statistics, and the coefficients that follow from a chunk's statistics."""
    hidden, weight, ids, *_ = inputs
    generator = torch.Generator().manual_seed(1)
    grad = torch.zeros(len(Stat), hidden.shape[0])
    grad[list(statistics)] = torch.randn(len(statistics), hidden.shape[0], generator=generator)
    grad = grad.to(ids.device)
    return lambda stats, tokens: coefficients(grad[:, tokens].to(stats.dtype), stats, weight.shape[0])


def expected(inputs, token_coefficients, dtype):
    """Statistics, gradients and dlogits of the specification in this dtype, from logits in it."""
    hidden, weight, ids, bias, options = inputs[:5]
    hidden = torch.where((ids >= 0)[:, None], hidden, 0).to(dtype)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    logits = (hidden @ weight.t())[None]
    stats = row_stats_ref(logits, ids, bias, options.transform)
    given = token_coefficients(stats, slice(None))
    grad = row_grad_ref(logits, ids, bias, options.transform, stats, given)[0].to(dtype)
    return stats, (grad @ weight, grad.t() @ hidden, grad.sum(0)), grad


def without(error_bound, ours, truth):
    """ours, as much nearer to truth as the bound allows."""
    error = ours.double() - truth
    return truth + error.sign() * (error.abs() - error_bound).clamp(min=0)


def check(no_worse_than_eager, inputs, token_coefficients, stats, gradients):
    """dW may be off by what its docstring says beside: a second rounding of the hidden states in bf16."""
    truth, true_gradients, dlogits = expected(inputs, token_coefficients, torch.float64)
    eager, eager_gradients, _ = expected(inputs, token_coefficients, inputs.hidden.dtype)
    for stat in Stat:
        no_worse_than_eager(stats[stat], eager[stat], truth[stat], stat.name, terms=16)
    names = ("hidden", "weight", "bias")
    for name, ours, plain, true in zip(names, gradients, eager_gradients, true_gradients):
        if name == "weight" and ours.numel() and ours.dtype == torch.bfloat16:
            hidden = torch.where((inputs.ids >= 0)[:, None], inputs.hidden, 0).double()
            ours = without(2**-8 * (dlogits.abs().t() @ hidden.abs()), ours, true)
        if ours.numel():
            no_worse_than_eager(ours, plain, true, name, terms=16)
