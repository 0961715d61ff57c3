"""A policy and its value model as one module.

An optimizer, DistributedDataParallel and a checkpoint take it whole. The value of a token is that of the
state in which it was drawn. It is read where its log-probability is read: at the token before it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastalign_kernels import PolicyLoss

from .data.sequence_batches import at_places
from .servable_heads import backbone

VALUE_HEAD = "value_head.safetensors"  # of a shared backbone, beside the policy's own files


class ActorCritic(nn.Module):
    """A fused causal LM (or PEFT's wrapper of one) with a value for each of its tokens.

    `value` is a sequence classifier with one label that scores packed sequences
    (fastalign.classifier.score_packed). If it is None, a linear layer, zero at first, reads the hidden
    states that enter the policy's lm_head, and its gradient reaches the backbone. `kl_coefficient`, a
    buffer, is the weight of the KL divergence. It is a buffer so that a checkpoint keeps an adaptive value.
    """

    kl_coefficient: Tensor

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        value: PreTrainedModel | PeftModel | None = None,
        *,
        kl_coefficient: float = 0.05,
    ):
        super().__init__()
        self.policy = policy
        self.shared = value is None
        if value is None:
            value = nn.Linear(
                policy.config.get_text_config().hidden_size, 1, device=policy.device, dtype=policy.dtype
            )
            nn.init.zeros_(value.weight)
            nn.init.zeros_(value.bias)
        self.value: Any = value
        self.register_buffer("kl_coefficient", torch.tensor(kl_coefficient, dtype=torch.float64))

    @property
    def device(self) -> torch.device:
        """The policy's device."""
        device: torch.device = self.policy.device
        return device

    def forward(
        self, arguments: Mapping[str, Any], at: Tensor, *, temperature: float, ppo: Mapping[str, Any]
    ) -> tuple[PolicyLoss, Tensor]:
        """PPO's loss of the policy, and the values [N] with gradient.

        `arguments` are those of packed sequences (fastalign.data.pack_sequences), `at` int64 [N]: the
        place, among all their B·T, before each token that is scored; `ppo` what `linear_ppo_loss` takes, its
        tensors [N].
        """
        shape = arguments["labels"].shape

        def spread(value: Any) -> Any:
            return at_places(value, at, shape) if isinstance(value, Tensor) and value.dim() else value

        mask = spread(torch.ones_like(at, dtype=torch.bool))
        output = self.policy(
            **arguments,
            use_cache=False,
            temperature=temperature,
            keep_hidden=self.shared,
            ppo={"mask": mask} | {name: spread(value) for name, value in ppo.items()},
        )
        return output.policy, self._values(arguments, at, output.last_hidden_state)

    def values(self, arguments: Mapping[str, Any], at: Tensor) -> Tensor:
        """The values [N] alone, in fp32 at least."""
        inputs = {name: value for name, value in arguments.items() if name != "labels"}
        shared = (
            backbone(self.policy)(**inputs, use_cache=False, return_dict=True).last_hidden_state
            if self.shared
            else None
        )
        return self._values(arguments, at, shared)

    def _values(self, arguments: Mapping[str, Any], at: Tensor, hidden: Tensor | None) -> Tensor:
        if hidden is not None:
            scores = self.value(hidden.flatten(0, 1)[at])
        else:
            inputs = {name: value for name, value in arguments.items() if name != "labels"}
            scores = self.value(**inputs, ends=at, use_cache=False).logits
        return scores[:, 0] if scores.element_size() > 4 else scores[:, 0].float()

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The weights that are trained, of the policy and of the value model."""
        parts = {"policy": self.policy, "value": self.value}
        return {
            name: [weight for weight in part.parameters() if weight.requires_grad]
            for name, part in parts.items()
        }

    def save_value_head(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write the head of a shared value model, whose whole weights are `state`, into a policy's folder."""
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / VALUE_HEAD)

    def load_value_head(self, folder: Path) -> None:
        """The value head that `save_value_head` left in a policy's folder."""
        self.value.load_state_dict(load_file(folder / VALUE_HEAD))
