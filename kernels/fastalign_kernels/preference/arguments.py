"""Checks of the preference losses' arguments."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .. import checks
from ..torch_func import unwrapped
from .formulas import DPO_LOSS_TYPES, PAIR_LOSSES, SMOOTHING

KTO_LOSS_TYPES = ("kto", "apo_zero_unpaired")
REDUCTIONS = ("mean", "sum", "none")


def pair_options(loss_type: str, beta: float, label_smoothing: float) -> tuple[float, float]:
    """beta and label_smoothing of `dpo_loss` as floats, checked."""
    checks.choice("loss_type", loss_type, DPO_LOSS_TYPES)
    return pair_numbers(loss_type, beta, label_smoothing)


def pair_numbers(loss_type: str, beta: float, label_smoothing: float) -> tuple[float, float]:
    """beta and label_smoothing of a loss of PAIR_LOSSES as floats, checked."""
    beta = checks.above_zero("beta", beta)
    label_smoothing = checks.number("label_smoothing", label_smoothing)
    allowed = PAIR_LOSSES[loss_type].smoothing
    if not SMOOTHING[allowed](label_smoothing):
        raise ValueError(
            f"label_smoothing: got {label_smoothing}, expected {allowed} with loss_type={loss_type!r}"
        )
    return beta, label_smoothing


def unpaired_options(
    loss_type: str, beta: float, desirable_weight: float, undesirable_weight: float
) -> tuple[float, float, float]:
    """The numbers of `kto_loss` as floats, checked."""
    checks.choice("loss_type", loss_type, KTO_LOSS_TYPES)
    return (
        checks.above_zero("beta", beta),
        checks.at_least_zero("desirable_weight", desirable_weight),
        checks.at_least_zero("undesirable_weight", undesirable_weight),
    )


def scalar_kl(kl: Tensor) -> Tensor:
    """The kl of `kto_loss` as a scalar; some trainers have it in a tensor [1]."""
    return kl.view(()) if kl.shape == (1,) else kl


def check_kl(kl: Tensor | None, like_name: str, like: Tensor) -> Tensor:
    """The kl of KTO as a scalar on the device of `like`, checked."""
    if kl is None:
        raise ValueError("kl: got None, expected a scalar tensor >= 0 with loss_type='kto'")
    kl = scalar_kl(kl)
    checks.shape("kl", kl, (), "a scalar")
    checks.dtype("kl", kl, checks.FLOATS)
    checks.device("kl", kl, like_name, like)
    _check_at_least_zero("kl", kl)
    return kl


def check_sequences(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not floating point or not of the first one's shape and device."""
    checks.tensors(**tensors)
    first, like = next(iter(tensors.items()))
    checks.supported_device(first, like)
    for name, tensor in tensors.items():
        checks.like(name, tensor, checks.FLOATS, first, like)


def check_lengths(lengths: Mapping[str, Tensor | None], like_name: str, like: Tensor) -> None:
    """Refuse lengths that are not integers >= 0 of the shape and device of `like`."""
    for name, value in lengths.items():
        if value is not None:
            checks.tensor(name, value)
            checks.like(name, value, checks.INTEGERS, like_name, like)
            _check_at_least_zero(name, value)


def check_lengths_of_type(lengths: Mapping[str, Tensor | None], loss_type: str) -> None:
    """Refuse lengths of `dpo_loss` that the loss type does not take, and one without the other."""
    takes = PAIR_LOSSES[loss_type].lengths
    some_given = any(value is not None for value in lengths.values())
    for name, value in lengths.items():
        if value is not None and takes == "refused":
            raise ValueError(
                f"{name}: got {checks.shown(value)}, expected None with loss_type={loss_type!r}, "
                "which takes sums over tokens"
            )
        if value is None and (takes == "needed" or some_given):
            raise ValueError(f"{name}: got None, expected both lengths [S] with loss_type={loss_type!r}")


def need_lengths(**lengths: Tensor | None) -> None:
    """Refuse lengths that are None."""
    for name, value in lengths.items():
        if value is None:
            raise ValueError(f"{name}: got None, expected the tokens [S] of each completion")


def _check_at_least_zero(name: str, tensor: Tensor) -> None:
    tensor = unwrapped(tensor)
    if checks.readable(tensor) and (tensor < 0).any():
        raise ValueError(f"{name}: got {tensor.min().item()}, expected values >= 0")
