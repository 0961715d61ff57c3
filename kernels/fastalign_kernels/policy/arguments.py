"""Arguments of functions over tokens [B, T] or [N] and a mask of them: checked, and in the form that the
kernels take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from .. import checks
from ..sequences import check_cu_seqlens, sum_by_sequence
from ..torch_func import requires_grad, unwrapped
from .ops import KL_ESTIMATORS, PolicyOptions
from .weights import TokenWeights, Weighting

AGGREGATIONS = ("token_mean", "sequence_mean", "sum")
ABOVE_ONE = 1 + 2**-23  # the next number after 1 in fp32
MASKS = (torch.bool, torch.uint8, *checks.INTEGERS, *checks.FLOATS)


class PolicyNumbers(TypedDict, total=False):
    """What `policy_options` checks."""

    clip: float | None
    clip_high: float | None
    dual_clip: float | None
    entropy_coefficient: float
    kl_coefficient: float
    kl_estimator: str


class PolicySettings(PolicyNumbers, total=False):
    """The options of `ppo_loss`. A module of fastalign.nn takes them in its constructor."""

    aggregation: str


class PolicyTensors(TypedDict, total=False):
    """The tensors of `ppo_loss` that may be left out, but for the entropy, which a head computes."""

    reference_logp: Tensor | None
    normalizer: float | Tensor | None
    cu_seqlens: Tensor | None


class PolicyArguments(PolicySettings, PolicyTensors, total=False):
    """The keywords of `ppo_loss` on a head.

    clip, clip_high, dual_clip, entropy_coefficient, kl_coefficient, kl_estimator, aggregation,
        reference_logp, normalizer, cu_seqlens: as in `ppo_loss`. The entropy is the head's, over the whole
        vocabulary.
    """


def token_weights(
    mask: Tensor,
    aggregation: str,
    normalizer: float | Tensor | None,
    cu_seqlens: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, TokenWeights]:
    """The mask as bool, and what each of its tokens counts in the loss."""
    checks.choice("aggregation", aggregation, AGGREGATIONS)
    if isinstance(normalizer, Tensor):
        checks.shape("normalizer", normalizer, (), "a scalar")
        checks.dtype("normalizer", normalizer, (*checks.FLOATS, *checks.INTEGERS))
        checks.device("normalizer", normalizer, "mask", mask)
        checks.divisor_value("normalizer", normalizer, low=0)  # 0: the whole batch has no token
    elif normalizer is not None:
        checks.above_zero("normalizer", normalizer)
    inside = as_bool(mask)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, "a mask", inside)
    divisor = normalizer.detach() if isinstance(normalizer, Tensor) else None
    number = 0.0 if isinstance(normalizer, Tensor) else normalizer or 0.0
    if aggregation == "sequence_mean" and inside.dim() == 2:
        return inside, TokenWeights(Weighting.SEQUENCES, divisor, number)
    if aggregation == "sequence_mean":
        if cu_seqlens is None:
            got = f"'sequence_mean' with a mask {list(inside.shape)} and without cu_seqlens"
            raise ValueError(f"aggregation: got {got}, expected a mask [B, T] or cu_seqlens [S + 1]")
        counts = sum_by_sequence(inside.double(), cu_seqlens)
        tokens = counts.repeat_interleave(cu_seqlens.diff(), output_size=inside.numel())
        total = divisor if divisor is not None else number or (counts > 0).sum()
        return inside, TokenWeights(Weighting.GIVEN, (tokens.to(dtype) * total).reciprocal())
    if divisor is not None:
        return inside, TokenWeights(Weighting.DIVISOR, divisor)
    if aggregation == "token_mean" and not number:
        return inside, TokenWeights(Weighting.TOKENS)
    return inside, TokenWeights(Weighting.NUMBER, number=1 / (number or 1))


def as_bool(mask: Tensor) -> Tensor:
    """The mask as bool. One of floats may hold 0 and 1 alone: a weight in it would be cut to 1 without a
    word."""
    if mask.dtype == torch.bool:
        return mask
    if mask.is_floating_point() and not mask.is_meta:
        right = (mask == 0) | (mask == 1)
        if checks.readable(mask):
            if not unwrapped(right).all():
                wrong = unwrapped(mask)[~unwrapped(right)][0].item()
                raise ValueError(f"mask: got {wrong}, expected 0 or 1 for each token")
        # On a GPU, and in compiled code, the device checks without the host
        elif not isinstance(mask, FakeTensor):
            torch._assert_async(right.all(), "mask: expected 0 or 1 for each token")
    return mask != 0


def per_token(advantages: Tensor, shape: torch.Size) -> Tensor:
    """Advantages of the tokens' shape: [B] or [B, 1] beside tokens [B, T] are one number a row."""
    if (
        advantages.shape != shape
        and len(shape) == 2
        and tuple(advantages.shape) in ((shape[0],), (shape[0], 1))
    ):
        return advantages.view(-1, 1).expand(shape)
    return advantages


def constant(x: Tensor) -> Tensor:
    """The tensor without gradient; itself where it has none, because a view costs the host 1 us."""
    return x.detach() if requires_grad(x) else x


def check_tokens(tensors: Mapping[str, Tensor | None], mask: Tensor) -> None:
    """[B, T] or [N], floating point, of the first one's shape and device, and a mask of that shape."""
    first, like = next(iter(tensors.items()))
    assert like is not None
    checks.tensor("mask", mask)
    checks.supported_device(first, like)
    if like.dim() not in (1, 2):
        raise ValueError(f"{first}: got shape {list(like.shape)}, expected [B, T] or [N]")
    for name, tensor in tensors.items():
        if tensor is not None:
            checks.like(name, tensor, checks.FLOATS, first, like)
    checks.like("mask", mask, MASKS, first, like)


def policy_options(
    clip: float | None,
    clip_high: float | None,
    dual_clip: float | None,
    entropy_coefficient: float,
    kl_coefficient: float,
    kl_estimator: str,
) -> PolicyOptions:
    checks.choice("kl_estimator", kl_estimator, KL_ESTIMATORS)
    for name, value in (("clip", clip), ("clip_high", clip_high)):
        if value is not None:
            checks.number(name, value, 0, expected="None or a number >= 0")
    if dual_clip is not None:
        checks.number("dual_clip", dual_clip, ABOVE_ONE, expected="None or a number above 1")
    high = clip if clip_high is None else clip_high
    return PolicyOptions(
        -torch.inf if clip is None else 1.0 - clip,
        torch.inf if high is None else 1.0 + high,
        torch.inf if dual_clip is None else float(dual_clip),
        checks.number("entropy_coefficient", entropy_coefficient),
        checks.number("kl_coefficient", kl_coefficient),
        KL_ESTIMATORS.index(kl_estimator),
    )
