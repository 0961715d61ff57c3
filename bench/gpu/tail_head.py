"""A synthetic head whose softmax is like a trained model's, for tail_eps on a GPU without a model.

    python -m bench.gpu.tail_head      # on a GPU: the numbers of Law that are nearest to SmolLM2-135M

A logit is the sum of the id's log-frequency by Zipf-Mandelbrot's law, a part that the tokens of one text
share, and a part of each token's own, times a sharpness of each token's own. One id, drawn from that, then
gets a share of the probability, uniform in [0, 0.98). The numbers are those for which one token, 256 and 1024
tokens at V = 49152 keep about as many columns as SmolLM2-135M's do on Python's language reference.
"""

from __future__ import annotations

import itertools
import time
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.operation import Shape

TEXT = 512
EPS = {"2^-12": 2.0**-12, "2^-14": 2.0**-14}
# share of 49152 columns kept by SmolLM2-135M's tokens, of (1, 256, 1024, 8192) tokens
SMOLLM2 = {
    "2^-12": (0.00257, 0.108, 0.191, 0.373),
    "2^-14": (0.00639, 0.202, 0.329, 0.572),
}


class Law(NamedTuple):
    """The numbers of a synthetic head."""

    zipf: float = 1.6
    offset: float = 30.0
    text: float = 1.6  # standard deviation of the part that a text shares
    token: float = 2.2  # of a token's own part
    spread: float = 0.0  # of the logarithm of the sharpness


def synthetic_head(shape: Shape, law: Law, device: str = "cuda") -> tuple[Tensor, Tensor, Tensor]:
    """hidden [N, H], weight [V, H] in bf16, and ids [N]."""
    N, H, V = shape
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    weight = normal(V, H) / H**0.5
    frequency = -law.zipf * torch.log(torch.arange(V, device=device) + law.offset)
    weight[:, 0] = frequency - frequency.mean()
    texts = normal(-(-N // TEXT), H).repeat_interleave(TEXT, 0)[:N]
    hidden = law.text * texts + law.token * normal(N, H)
    hidden[:, 0] = 1
    hidden *= torch.exp(law.spread * normal(N, 1))
    weight = weight.bfloat16()
    ids = torch.empty(N, dtype=torch.int64, device=device)
    share = torch.rand(N, generator=generator, device=device) * 0.98
    for rows in torch.arange(N, device=device).split(512):
        z = hidden[rows].bfloat16() @ weight.t()
        z = z.float()
        drawn = torch.multinomial(z.softmax(-1), 1, generator=generator)[:, 0]
        rest = z.scatter(1, drawn[:, None], -1e30).logsumexp(-1)
        boost = rest + torch.log(share[rows] / (1 - share[rows])) - z.gather(1, drawn[:, None])[:, 0]
        towards = weight[drawn].float()
        towards[:, 0] = 0
        hidden[rows] += towards * (boost / towards.square().sum(1))[:, None]
        ids[rows] = drawn
    return hidden.bfloat16(), weight, ids


def kept_shares(x: Tensor, w: Tensor, ids: Tensor, eps: float, most: int = 8192) -> tuple[float, ...]:
    """Shares of the columns kept by 1, 256, 1024 and all of the first `most` tokens."""
    x, ids = x[:most], ids[:most]
    single, blocks = 0.0, []
    for rows in torch.arange(len(x), device=x.device).split(256):
        keep = (x[rows] @ w.t()).float().softmax(-1) > eps
        single += keep.float().mean().item() * len(rows) / len(x)
        kept = keep.any(0)
        kept[ids[rows]] = True
        blocks.append(kept)
    all_blocks = torch.stack(blocks)
    of_1024 = torch.stack([group.any(0) for group in all_blocks.split(4)])
    return (
        single,
        all_blocks.float().mean().item(),
        of_1024.float().mean().item(),
        all_blocks.any(0).float().mean().item(),
    )


def fit(seconds: float) -> tuple[Law, dict[str, tuple[float, ...]]]:
    """The law nearest to SMOLLM2 among a grid, as far as the time goes, and what it keeps."""
    begin, least = time.perf_counter(), float("inf")
    best: tuple[Law, dict[str, tuple[float, ...]]] = Law(), {}
    grid = itertools.product(
        (1.3, 1.6, 1.0, 2.0), (30.0,), (1.0, 1.6, 0.5, 2.2), (1.0, 1.6, 2.2), (0.0, 0.3, 0.6)
    )
    for numbers in grid:
        if time.perf_counter() - begin > seconds:
            break
        law = Law(*numbers)
        x, w, ids = synthetic_head(Shape(2048, 576, 49152), law)
        found = {name: kept_shares(x, w, ids, eps) for name, eps in EPS.items()}
        off = sum(
            (torch.tensor(found[name][i]) / SMOLLM2[name][i]).log().square().item()
            for name in EPS
            for i in range(3)
        )
        if off < least:
            least, best = off, (law, found)
    return best


if __name__ == "__main__":
    print(*fit(20.0), sep="\n")
