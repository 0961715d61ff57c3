"""The losses as modules, as in torch.nn: options in the constructor, tensors in the call.

No module owns parameters. The head's weight is the model's and comes with the call, so ties, adapters and
sharding stay with the model. A LoRA adapter on the head comes with the call too, as `lora`. Options are
checked in the constructor, tensors in the call.
"""

from .policy import LinearGRPOLoss, LinearPPOLoss
from .sequences import LinearCPOLoss, LinearDPOLoss, LinearKTOLoss, LinearORPOLoss, LinearSimPOLoss
from .tokens import CrossEntropyLoss, LinearCrossEntropyLoss, LinearDistillationLoss

__all__ = [
    "CrossEntropyLoss",
    "LinearCPOLoss",
    "LinearCrossEntropyLoss",
    "LinearDPOLoss",
    "LinearDistillationLoss",
    "LinearGRPOLoss",
    "LinearKTOLoss",
    "LinearORPOLoss",
    "LinearPPOLoss",
    "LinearSimPOLoss",
]
