"""Rows to draw from, and whether draws follow a distribution."""

import math

import torch


def hostile(V: int, scale: float, dtype: torch.dtype, device: str, rows: int = 12) -> torch.Tensor:
    """Rows with NaN, +inf, -inf, ties, one value, zeros of both signs; the first ones are ordinary."""
    x = torch.randn(rows, V, generator=torch.Generator().manual_seed(V)) * scale
    if V > 100:
        x[-1, 5] = math.nan
        x[-2, 7] = math.inf
        x[-3] = -math.inf
        x[-4, ::2] = -math.inf
        x[-5] = 1.5
        x[-6, :50], x[-6, 50:100] = 0.0, -0.0
        x[-7] = (x[-7] * 4).round() / 4
    return x.to(device, dtype)


def bit_masks(rows: int, V: int, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(-(2**31), 2**31, (rows, -(-V // 32)), generator=generator, dtype=torch.int32).to(
        device
    )


def kept_mass(x: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """Probabilities [V] in fp64 after the filters, ties at a threshold kept: written independently of
    `sample_ref`, value by value."""
    p = (x.double() / temperature).softmax(-1)
    if top_k:
        p = torch.where(x >= sorted(x.tolist(), reverse=True)[top_k - 1], p, 0.0)
        p = p / p.sum()
    if top_p < 1:
        keeps = {value: p[x > value].sum().item() < top_p for value in set(x.tolist())}
        p = torch.where(torch.tensor([keeps[value] for value in x.tolist()]), p, 0.0)
    return p / p.sum()


def surprise(counts: torch.Tensor, p: torch.Tensor) -> float:
    """G-test of counts [V] against probabilities p [V], none of them where p is 0, as a standard normal
    deviate (Wilson and Hilferty).

    Ids of fewer than 10 expected draws are pooled with others of their own order of magnitude, so that a tail
    is seen by its depth.
    """
    n = counts.sum().item()
    cells: dict[object, list[float]] = {}
    for token, (count, expected) in enumerate(zip(counts.tolist(), (p * n).tolist())):
        if expected > 0:
            key = token if expected >= 10 else round(2 * math.log(expected))
            cell = cells.setdefault(key, [0.0, 0.0])
            cell[0] += count
            cell[1] += expected
    G = 2 * sum(count * math.log(count / expected) for count, expected in cells.values() if count)
    free = len(cells) - 1
    return ((max(G, 0.0) / free) ** (1 / 3) - (1 - 2 / (9 * free))) / math.sqrt(2 / (9 * free))
