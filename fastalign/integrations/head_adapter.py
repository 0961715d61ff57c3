"""Refusing LoRA on lm_head where a host hands over the head's weight without its adapter."""

from functools import wraps
from typing import Any

from torch import nn


class HeadAdapter:
    """The adapted lm_head of the model that a host is running.

    Args:
        host: its name.
        culprit: what of the host takes the weight alone.
        remedy: the option of the host that avoids it.
    """

    def __init__(self, host: str, culprit: str, remedy: str) -> None:
        self.host = host
        self.culprit = culprit
        self.remedy = remedy
        self.name: str | None = None

    def noted(self, original: Any, attribute: str) -> Any:
        """A method of the host that notes the adapted lm_head of its owner's model, `attribute`, while it
        runs."""

        @wraps(original)
        def noting(owner: Any, *args: Any, **kwargs: Any) -> Any:
            model = getattr(owner, attribute, None)
            modules = model.named_modules() if isinstance(model, nn.Module) else ()
            adapted = (name for name, module in modules if hasattr(module, "lora_A"))
            self.name = next((name for name in adapted if name.rpartition(".")[2] == "lm_head"), None)
            try:
                return original(owner, *args, **kwargs)
            finally:
                self.name = None

        return noting

    def refuse(self) -> None:
        """Raise ValueError if the lm_head of the running model is adapted."""
        if self.name is not None:
            raise ValueError(
                f"{self.host}: got LoRA on {self.name}, expected other target modules: {self.culprit} would "
                "leave the adapter out of the logits. Leave lm_head out of the adapter's target modules, or "
                f"set {self.remedy}"
            )
