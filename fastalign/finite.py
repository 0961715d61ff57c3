"""Find weights with NaN or inf, and name them."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def find_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """A sentence that names the first tensor with NaN or inf; None if all are finite.

    It passes over the tensors once, without temporary copies, and waits for the device once.
    """
    floating = [(name, tensor) for name, tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    if not floating:
        return None
    # NaN passes through min and max, and inf is one of them.
    device = floating[0][1].device
    ends = torch.stack(
        [end.to(device, torch.float64) for _, tensor in floating for end in torch.aminmax(tensor)]
    ).view(-1, 2)
    wrong = [number for number, pair in enumerate(ends.tolist()) if not all(map(math.isfinite, pair))]
    if not wrong:
        return None
    name, tensor = floating[wrong[0]]
    count = int((~tensor.isfinite()).sum())
    further = f", and so do {len(wrong) - 1} more tensors" if len(wrong) > 1 else ""
    return f"{name} holds {count} values of {tensor.numel()} that are NaN or inf in {tensor.dtype}{further}"
