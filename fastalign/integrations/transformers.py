"""transformers' Trainer through fastalign.

`fastalign.causal_lm.fuse_head(model)` is the one line that saves memory: no logits are made. For a model that
keeps its logits:

    model.loss_function = fastalign.integrations.transformers.loss_function
"""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fastalign_kernels import cross_entropy


def loss_function(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: float | Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Cross-entropy of the next token, as transformers' ForCausalLMLoss, from logits of any float dtype.

    The logits are not copied to fp32.

    Args:
        logits: [..., T, V].
        labels: [..., T]; shifted here. Not read if `shift_labels` is given.
        vocab_size: V.
        num_items_in_batch: divides the sum over tokens. Default: the number of tokens that are not ignored.
        shift_labels: [..., T], already shifted.
        **_: what the model's caller gave besides, which transformers' function ignores too.
    Raises:
        ValueError: neither labels nor shift_labels, or logits whose last dimension is not `vocab_size`.
    """
    if logits.shape[-1] != vocab_size:
        raise ValueError(f"logits: got {logits.shape[-1]} columns, expected vocab_size, {vocab_size}")
    if shift_labels is None:
        if labels is None:
            raise ValueError("labels: got None without shift_labels, expected one of them")
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(logits.device)
    targets = shift_labels.to(logits.device).view(logits.shape[:-1])
    return cross_entropy(logits, targets, ignore_index=ignore_index, num_items=num_items_in_batch)
