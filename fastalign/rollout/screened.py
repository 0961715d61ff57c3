"""Rollouts with 8-bit logits, and exact ones where they decide what is drawn."""

from typing import Any

import torch
from torch import Tensor

from fastalign_kernels import gemm_int8
from fastalign_kernels.linear.screen_draws import ScreenedDraws

from ..fused_options import checked_options
from ..probe import LogitTransform
from ..servable_heads import adapted_head, backbone_of


class ScreenedHead:
    """The head of a fused causal LM for the draws of one rollout, and the backbone that feeds it."""

    def __init__(self, base: Any, transform: LogitTransform) -> None:
        self.head, self.backbone = base.get_output_embeddings(), backbone_of(base)
        self.vocab_size: int = base.get_input_embeddings().weight.shape[0]
        self.draws = ScreenedDraws(*transform)

    def logits(self, hidden: Tensor, **options: Any) -> Tensor:
        """Logits [B, V] of hidden states [B, H], for `sample` with these options."""

        def screened(hidden: Tensor, weight: Tensor, _: Tensor, *, bias: Tensor | None) -> Tensor:
            return self.draws.logits(hidden, weight, bias, **options)

        # The module is called, so that its hooks run and PEFT picks the active copy of it.
        no_targets = torch.zeros(len(hidden), dtype=torch.int64)
        found: Tensor = self.head(hidden, no_targets, head=screened)
        return found


def screened_head(base: Any, screen: bool | None) -> ScreenedHead | None:
    """The head of `base` with a screen; None without one.

    Raises ValueError if this machine or the head's dtype has no 8-bit products, if the head is not fused, or
    if it has an adapter.
    """
    head = base.get_output_embeddings()
    if not checked_options(head, screen=screen)["screen"]:
        return None
    if refused := gemm_int8.refusal(head.weight.device, head.weight.dtype):
        raise ValueError(f"screen: got True, expected None: {refused}")
    transform: LogitTransform | None = base.__dict__.get("_fastalign_transform")
    if transform is None:
        raise ValueError(
            f"screen: got True with a {type(base).__name__} that is not fused, expected None; or call "
            "fuse_head(model), which proves what the model does with lm_head's output"
        )
    if adapted_head(base) is not None:
        raise ValueError("screen: got True with an adapter on lm_head, expected None")
    return ScreenedHead(base, transform)
