"""torch 2.13's linear_cross_entropy and LinearCrossEntropyLoss through fastalign's head.

    from fastalign.integrations.torch import linear_cross_entropy

The signatures, the options and the dimensions are torch's. Results are fp32 for bf16 and fp16 inputs, where
torch rounds the loss to the input's dtype. `options` sets torch's chunks and the dtype of its sums. fastalign
always works in chunks and always sums in fp32, so it reads only `batch_chunk_size`. It runs with any version
of torch that fastalign supports.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastalign_kernels as fk

from .soft_targets import soft_cross_entropy, target_weights


class _Options(NamedTuple):
    class_weights: Tensor | None
    ignore_index: int
    label_smoothing: float
    workspace_mib: float | None


def linear_cross_entropy(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> Tensor:
    """Cross-entropy of linear(input, linear_weight, linear_bias) and target, without the logits in memory.

    Args:
        input: [N, H] or [H].
        linear_weight: [C, H], or [C, d_1, ..., d_K, H] with an input [N, H].
        target: class indices [N], [] or [N, d_1, ..., d_K]; or class probabilities [N, C], [C] or
            [N, C, d_1, ..., d_K], floating point.
        linear_bias: [C], or [C, d_1, ..., d_K].
        weight: [C], a weight for each class. The mean over indices is divided by the sum of their weights,
            the mean over probabilities by their number, as in torch.
        reduction: "mean", "sum" or "none".
        ignore_index: the index of ignored targets. None: -100. Refused with probabilities.
        label_smoothing: in [0, 1].
        options: torch.nn.LinearCrossEntropyOptions or None. Only its batch_chunk_size is used, which bounds
            the rows of logits that exist at once.
    Returns:
        A scalar, or the shape of indices with reduction="none". fp32; fp64 for fp64.
    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range.
    """
    classes, places, H = _head_shape(input, linear_weight)
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise ValueError(
            f"linear_bias: got shape {list(linear_bias.shape)}, expected {list(linear_weight.shape[:-1])}"
        )
    if weight is not None and weight.shape != (classes,):
        raise ValueError(f"weight: got shape {list(weight.shape)}, expected [C] = [{classes}]")
    rows = input.shape[:-1]
    soft = target.shape == (*rows, classes, *places)
    if not soft and target.shape != (*rows, *places):
        raise ValueError(
            f"target: got shape {list(target.shape)}, expected indices {[*rows, *places]} or probabilities "
            f"{[*rows, classes, *places]}"
        )
    if soft and ignore_index is not None:
        raise ValueError(f"ignore_index: got {ignore_index} with class probabilities, expected None")
    if soft and not target.is_floating_point():
        raise ValueError(f"target: got {target.dtype}, expected floating point for class probabilities")
    read = _Options(
        weight,
        -100 if ignore_index is None else ignore_index,
        label_smoothing,
        _workspace_mib(options, classes, input.dtype),
    )
    if not soft and not places:
        return _of_indices(input, linear_weight, target, linear_bias, reduction, read)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: got {reduction!r}, expected 'mean', 'sum' or 'none'")

    number = math.prod(places)
    weights = linear_weight.reshape(classes, number, H).unbind(1)
    biases: Sequence[Tensor | None] = [None] * number
    if linear_bias is not None:
        biases = linear_bias.reshape(classes, number).unbind(1)
    targets = target.reshape(*rows, *([classes] if soft else []), number).unbind(-1)
    of_place = _of_probabilities if soft else _of_indices
    inner = "none" if reduction == "none" else "sum"
    losses = torch.stack(
        [of_place(input, *head, inner, read) for head in zip(weights, targets, biases, strict=True)], -1
    )
    if reduction == "none":
        return losses.reshape((*rows, *places))
    total = losses.sum()
    if reduction == "sum":
        return total
    if soft:
        return total / (math.prod(rows) * number)
    if weight is not None:
        return total / target_weights(weight, target, read.ignore_index).to(total.dtype).sum()
    return total / (target != read.ignore_index).sum()


class LinearCrossEntropyLoss(nn.Module):
    """torch.nn.LinearCrossEntropyLoss: a head `linear` [C * d_1 * ... * d_K, H] and its cross-entropy.

    A state dict of torch's module loads into this one, and the other way round.

    Args:
        in_features, num_classes: H and C.
        out_features: (d_1, ..., d_K).
        bias: whether the head has one.
        device, dtype: of the head.
        reduction, weight, ignore_index, label_smoothing, options: as in `linear_cross_entropy`.
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
    ) -> None:
        if weight is not None and weight.shape != (num_classes,):
            raise ValueError(f"weight: got shape {list(weight.shape)}, expected [C] = [{num_classes}]")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing: got {label_smoothing}, expected a number in [0, 1]")
        super().__init__()
        self.register_buffer("weight", weight)
        self.num_classes = num_classes
        self.out_features = out_features
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.options = options
        self.linear = nn.Linear(
            in_features, math.prod(out_features, start=num_classes), bias=bias, device=device, dtype=dtype
        )

    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # noqa: A002
        """The loss of input [N, H] or [H], and target as in `linear_cross_entropy`."""
        classes = (self.num_classes, *self.out_features)
        bias = self.linear.bias
        return linear_cross_entropy(
            input,
            self.linear.weight.reshape(*classes, self.linear.in_features),
            target,
            linear_bias=None if bias is None else bias.reshape(classes),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
        )

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, out_features={self.out_features}, reduction={self.reduction}, "
            f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}"
        )


def _head_shape(hidden: Tensor, linear_weight: Tensor) -> tuple[int, tuple[int, ...], int]:
    """C, (d_1, ..., d_K) and H."""
    if hidden.dim() not in (1, 2):
        raise ValueError(f"input: got shape {list(hidden.shape)}, expected [N, H] or [H]")
    if linear_weight.dim() < 2 or linear_weight.shape[-1] != hidden.shape[-1]:
        raise ValueError(
            f"linear_weight: got shape {list(linear_weight.shape)}, expected [C, ..., H] with "
            f"H = {hidden.shape[-1]} as in input"
        )
    classes, *places, H = linear_weight.shape
    if places and hidden.dim() == 1:
        raise ValueError(
            f"input: got shape {list(hidden.shape)} with linear_weight {list(linear_weight.shape)}, "
            "expected [N, H]"
        )
    return classes, tuple(places), H


def _workspace_mib(options: Any, classes: int, dtype: torch.dtype) -> float | None:
    """MiB of batch_chunk_size rows of logits, or None for fastalign's default."""
    if options is None:
        return None
    if type(options).__name__ != "LinearCrossEntropyOptions":
        raise ValueError(
            f"options: got {type(options).__name__}, expected torch.nn.LinearCrossEntropyOptions or None"
        )
    size = 8 if dtype == torch.float64 else 4
    return None if options.batch_chunk_size is None else options.batch_chunk_size * classes * size / 2**20


def _of_indices(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, reduction: str, options: _Options
) -> Tensor:
    """The loss of class indices [...] under one head [C, H]."""
    class_weights, ignore_index, label_smoothing, workspace_mib = options
    weights = None
    if class_weights is not None:
        weights = target_weights(class_weights, target, ignore_index)
    if weights is None or class_weights is None or not label_smoothing:
        return fk.linear_cross_entropy(
            hidden,
            weight,
            target,
            bias,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
            token_weights=weights,
            workspace_mib=workspace_mib,
        )
    stats = fk.linear_token_stats(
        hidden, weight, target, bias, entropy=False, ignore_index=ignore_index, workspace_mib=workspace_mib
    )
    smooth = soft_cross_entropy(stats.lse, hidden, weight, bias, class_weights / len(class_weights))
    smooth = smooth.where(target != ignore_index, 0)
    losses = label_smoothing * smooth - (1 - label_smoothing) * weights * stats.logp
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / weights.to(losses.dtype).sum()


def _of_probabilities(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, reduction: str, options: _Options
) -> Tensor:
    """The loss of class probabilities [..., C] under one head [C, H], summed or not."""
    ids = torch.zeros(hidden.shape[:-1], dtype=torch.long, device=hidden.device)
    stats = fk.linear_token_stats(
        hidden, weight, ids, bias, entropy=False, workspace_mib=options.workspace_mib
    )
    target = target.to(stats.lse.dtype)
    if options.label_smoothing:
        target = (1 - options.label_smoothing) * target + options.label_smoothing / weight.shape[0]
    if options.class_weights is not None:
        target = target * options.class_weights
    losses = soft_cross_entropy(stats.lse, hidden, weight, bias, target)
    return losses if reduction == "none" else losses.sum()
