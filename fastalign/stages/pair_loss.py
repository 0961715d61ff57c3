"""dpo_loss as `fastalign dpo` calls it, and a check of its options that runs before a model is loaded."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastalign_kernels.preference.formulas import PAIR_LOSSES
from fastalign_kernels.preference.losses import dpo_loss


def pair_loss(logps: Sequence[Tensor], lengths: Sequence[Tensor], *, loss_type: str, **options: Any) -> Any:
    """dpo_loss summed over pairs.

    logps: of the policy (chosen, rejected), then of the reference, [pairs] each. lengths: tokens of the
    chosen and the rejected completions, which go to the loss if it takes them. options: beta and
    label_smoothing.
    """
    if PAIR_LOSSES[loss_type].lengths != "refused":
        options |= {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
    return dpo_loss(*logps, loss_type=loss_type, reduction="sum", **options)


def check_pair_loss(**options: Any) -> None:
    """Raise ValueError for options of `pair_loss` that exclude each other."""
    logps, lengths = torch.zeros(4, 1), torch.ones(2, 1, dtype=torch.int64)
    pair_loss(list(logps), list(lengths), **options)
