"""Liger 0.8.5's losses through fastalign: the same class names, constructors, call orders and results.

    from fastalign.integrations.liger import LigerFusedLinearCrossEntropyLoss

Liger need not be installed. `compiled` and `chunk_size` change no value in Liger; they are accepted, and
fastalign plans its chunks itself. Gradients are summed in fp32. Where Liger rounds a result to bf16, it stays
fp32 here. Statistics beside a loss have no gradient, as Liger's have none.

For a model of transformers, one line replaces the fused loss of `apply_liger_kernel_to_<model>`:

    fastalign.causal_lm.fuse_head(model)
"""

from typing import Any

from .cross_entropy import CrossEntropyOutput, LigerCrossEntropyLoss, LigerFusedLinearCrossEntropyLoss
from .distillation import LigerFusedLinearJSD, LigerFusedLinearJSDLoss, LigerJSD
from .grpo import LigerFusedLinearGRPOLoss
from .kto import LigerFusedLinearKTOLoss
from .preference import (
    LigerFusedLinearCPOLoss,
    LigerFusedLinearDPOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
)

__all__ = [
    "CrossEntropyOutput",
    "LigerCrossEntropyLoss",
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearGRPOLoss",
    "LigerFusedLinearJSD",
    "LigerFusedLinearJSDLoss",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearSimPOLoss",
    "LigerJSD",
]

_NOT_SERVED = {
    "LigerFusedLinearCosineSimilarityLoss": "no loss of fastalign compares logits by their cosine",
    "LigerFusedLinearKLDivLoss": "LigerFusedLinearJSDLoss(beta=0) is that divergence",
    "LigerKLDIVLoss": "LigerJSD(beta=0) is its divergence of log-probabilities, as a mean over tokens",
}


# `from … import NAME` shows the text of an ImportError alone. No class can be that and an AttributeError, so
# hasattr raises for these names.
def __getattr__(name: str) -> Any:
    if name.startswith("apply_liger_kernel_to_"):
        raise ImportError(
            f"fastalign.integrations.liger: got {name}, expected fastalign.causal_lm.fuse_head(model), "
            "which replaces its fused loss"
        )
    if name in _NOT_SERVED:
        raise ImportError(
            f"fastalign.integrations.liger: got {name}, expected one of {', '.join(__all__)}: "
            f"{_NOT_SERVED[name]}"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
