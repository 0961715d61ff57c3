"""The losses of pairs as `fastalign dpo` calls them, and a check of their options before a model loads."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastalign_kernels import PreferenceLoss, cpo_loss, orpo_loss, simpo_loss
from fastalign_kernels.preference.formulas import PAIR_LOSSES
from fastalign_kernels.preference.losses import dpo_loss

REFERENCE_FREE: dict[str, Callable[..., PreferenceLoss]] = {
    "orpo": orpo_loss,
    "simpo": simpo_loss,
    "cpo": cpo_loss,
}


def pair_loss(
    logps: Sequence[Tensor], lengths: Sequence[Tensor], *, loss_type: str, nll_mean: bool, **options: Any
) -> PreferenceLoss:
    """The loss summed over pairs, with the rewards of both completions.

    logps: of the policy (chosen, rejected), then of the reference if the loss has one, [pairs] each.
    lengths: tokens of the chosen and the rejected completions, which go to the loss if it takes them.
    nll_mean: CPO's NLL is the mean over a completion's tokens. options: the numbers of the loss.
    """
    loss = REFERENCE_FREE.get(loss_type)
    both = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
    if loss is None:
        given = both if PAIR_LOSSES[loss_type].lengths != "refused" else {}
        return dpo_loss(*logps, loss_type=loss_type, reduction="sum", **given | options)
    if loss is cpo_loss:
        both = {"chosen_lengths": lengths[0]} if nll_mean else {}
    return loss(*logps, reduction="sum", **both, **options)


def check_pair_loss(*, loss_type: str, nll_mean: bool, **options: Any) -> None:
    """Raise ValueError for options of `pair_loss` that the loss does not take or that exclude each other."""
    taken = inspect.signature(REFERENCE_FREE.get(loss_type, dpo_loss)).parameters
    for name, value in options.items():
        if name not in taken:
            raise ValueError(
                f"{name}: got {value} with loss_type={loss_type}, expected none: the loss does not take it"
            )
    if nll_mean and loss_type != "cpo":
        raise ValueError(
            f"nll_mean: got True with loss_type={loss_type}, expected loss_type=cpo; the NLL of orpo and "
            "simpo is a mean in any case"
        )
    logps, lengths = torch.zeros(2 if loss_type in REFERENCE_FREE else 4, 1), torch.ones(2, 1).long()
    pair_loss(list(logps), list(lengths), loss_type=loss_type, nll_mean=nll_mean, **options)
