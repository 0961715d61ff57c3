"""The losses as modules: options in the constructor, tensors in the call, as torch.nn has it. No module owns parameters: the head's
weight is the model's and comes with the call, so that ties, adapters and sharding stay the model's business.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastalign_kernels import cross_entropy, linear_cross_entropy


class _Loss(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class CrossEntropyLoss(_Loss):
    """`fastalign.cross_entropy` as a module: logits [..., V], targets [...] -> loss in nats.

    The constructor takes that function's options (V is the last dimension, where torch has it second); errors are raised as there.
    """

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        reduction: str = "mean",
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            temperature=temperature,
            reduction=reduction,
            inplace_backward=inplace_backward,
        )

    def forward(
        self, logits: Tensor, targets: Tensor, *, token_weights: Tensor | None = None, num_items: float | Tensor | None = None
    ) -> Tensor:
        return cross_entropy(logits, targets, token_weights=token_weights, num_items=num_items, **self.options)  # type: ignore[arg-type]


class LinearCrossEntropyLoss(_Loss):
    """`fastalign.linear_cross_entropy` as a module: hidden [..., H], weight [V, H], targets [...], bias [V] or None -> loss in nats.

    The constructor takes that function's options; errors are raised as there.
    """

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        temperature: float = 1.0,
        reduction: str = "mean",
        workspace_mib: float | None = None,
    ) -> None:
        super().__init__(
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            logit_scale=logit_scale,
            temperature=temperature,
            reduction=reduction,
            workspace_mib=workspace_mib,
        )

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None = None,
        *,
        token_weights: Tensor | None = None,
        num_items: float | Tensor | None = None,
    ) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, bias, token_weights=token_weights, num_items=num_items, **self.options)  # type: ignore[arg-type]
