"""The ids that the filters of `sample` kept, from its counts: the largest logits of each row."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class KeptIds(NamedTuple):
    """The ids that the filters left in each row, in CSR, as `linear_logprobs(..., kept=)` takes them.

    Those of row b are ids[offsets[b] : offsets[b + 1]], in descending order of their logits. A finished row
    and one that is not valid have none.
    """

    offsets: Tensor  # [B + 1] int64
    ids: Tensor  # [M] int64


def unpacked(mask: Tensor, V: int) -> Tensor:
    """int32 words [B, ceil(V / 32)] as bool [B, V]."""
    words = mask.long()[..., None] >> torch.arange(32, device=mask.device)
    return (words & 1).bool().flatten(-2)[:, :V]


def penalised(logits: Tensor, penalty: Tensor, seen: Tensor | None, allowed: Tensor | None) -> Tensor:
    """Logits [B, V] after the repetition penalty [B, 1] and the mask, in their dtype."""
    V = logits.shape[1]
    z = logits
    if seen is not None:
        factor = penalty.to(z.dtype)
        z = torch.where(unpacked(seen, V), torch.where(z < 0, z * factor, z / factor), z)
    return z if allowed is None else torch.where(unpacked(allowed, V), z, -math.inf)


class KeptRows(NamedTuple):
    """What determines the ids that the filters left: tensors of fixed size, which CUDA graphs can fill."""

    z: Tensor  # [B, V] penalised logits
    kept: Tensor  # [B] int64: how many ids the filters left
    token: Tensor  # [B] int64, the drawn one

    def ids(self) -> KeptIds:
        """The `kept` largest of z in each row. Waits for the device: their number sizes the result.

        The filters are thresholds and keep ties together, so the number alone determines the set. A set of
        one is the token: at temperature 0 the lowest id among equal ones.
        """
        kept = self.kept
        most = int(kept.max()) if kept.numel() else 0
        ids = self.z.topk(most).indices
        if most:
            ids[:, 0] = torch.where(kept == 1, self.token, ids[:, 0])
        inside = torch.arange(most, device=kept.device) < kept[:, None]
        return KeptIds(torch.cat([kept.new_zeros(1), kept.cumsum(0)]), ids[inside])
