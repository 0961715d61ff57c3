"""Liger's GRPO on the head."""

from typing import Any

import torch
from torch import Tensor, nn

import fastalign_kernels as fk

SERVED = ("grpo", "bnpo", "dapo", "dr_grpo")


class LigerFusedLinearGRPOLoss(nn.Module):
    """`fastalign.linear_ppo_loss` with Liger's options, which weigh one advantage a completion.

    Args:
        beta: the weight of the KL, k3.
        compiled, chunk_size: change no value.
        use_ref_model: False: the KL is 0.
        epsilon_low, epsilon_high: `linear_ppo_loss`'s clip and clip_high.
        loss_type: "grpo", "bnpo", "dapo" or "dr_grpo". Liger's cispo, sapo, vespo and luspo are refused.
        max_completion_length: dr_grpo divides by it and by the number of completions.
        importance_sampling_level: "token". "sequence" (GSPO) is refused.
        sapo_temperature_pos, sapo_temperature_neg, vespo_k_pos, vespo_lambda_pos, vespo_k_neg,
            vespo_lambda_neg: belong to loss types that are refused. They are not read, as in Liger.
        temperature: divides the logits.
        delta: `linear_ppo_loss`'s dual_clip, at least 1 + epsilon_high. The share of clipped tokens includes
            those that it clips; Liger's does not.
        use_bias_correction_kl: refused.
    Raises:
        ValueError: an option that is not served.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__()
        if loss_type not in SERVED:
            raise ValueError(f"loss_type: got {loss_type!r}, expected one of {', '.join(SERVED)}")
        if importance_sampling_level != "token":
            raise ValueError(
                f"importance_sampling_level: got {importance_sampling_level!r}, expected 'token'"
            )
        if use_bias_correction_kl:
            raise ValueError("use_bias_correction_kl: got True, expected False")
        if loss_type == "dr_grpo" and max_completion_length is None:
            raise ValueError("max_completion_length: got None with loss_type='dr_grpo', expected a number")
        if delta is not None and delta < 1 + epsilon_high:
            raise ValueError(f"delta: got {delta}, expected at least 1 + epsilon_high, {1 + epsilon_high}")
        self.beta = beta
        self.use_ref_model = use_ref_model
        self.loss_type = loss_type
        self.max_completion_length = max_completion_length
        self.temperature = temperature
        self.clips: dict[str, Any] = {"clip": epsilon_low, "clip_high": epsilon_high, "dual_clip": delta}

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss, and its metrics without gradient: the KL if beta is not 0, and the share that is clipped.

        Args:
            _input, lin_weight, selected_token_ids: [B, T, H], [V, H], [B, T]. _input comes first.
            attention_mask: [B, T] bool, or 0 and 1.
            advantages: [B].
            bias: [V].
            ref_per_token_logps, old_per_token_logps: [B, T] in nats. Without the first, a reference is scored
                from ref_input [B, T, H], ref_weight [V, H] and ref_bias [V].
            vllm_is_ratio: [B, T], [B, 1] or [B], >= 0. Multiplies each token's policy loss.
            num_items_in_batch: the divisor of dapo over all processes. None: the mask's tokens.
        """
        if vllm_is_ratio is not None:
            ratio = vllm_is_ratio[:, None] if vllm_is_ratio.dim() == 1 else vllm_is_ratio
            advantages = (advantages[:, None] * ratio).expand(selected_token_ids.shape)
        reference = None
        if self.beta and self.use_ref_model:
            reference = ref_per_token_logps
            if reference is None:
                reference = self._reference(selected_token_ids, ref_input, ref_weight, ref_bias)
        scored = fk.linear_ppo_loss(
            _input,
            lin_weight,
            selected_token_ids,
            old_per_token_logps,
            advantages,
            attention_mask,
            bias,
            reference_logp=reference,
            kl_coefficient=0.0 if reference is None else self.beta,
            temperature=self.temperature,
            **self.clips,
            **self._aggregation(attention_mask, num_items_in_batch),
        )
        if not self.beta:
            return scored.loss, (scored.clip_fraction,)
        kl = scored.loss.new_zeros(()) if scored.kl is None else scored.kl
        return scored.loss, (kl, scored.clip_fraction)

    def _aggregation(self, mask: Tensor, num_items: float | Tensor | None) -> dict[str, Any]:
        """`linear_ppo_loss`'s options for the loss type."""
        B = mask.shape[0]
        if self.loss_type == "grpo":
            return {"aggregation": "sequence_mean", "normalizer": B}
        if self.loss_type == "dr_grpo":
            assert self.max_completion_length is not None
            return {"aggregation": "sum", "normalizer": B * self.max_completion_length}
        if self.loss_type == "bnpo":
            return {"aggregation": "token_mean"}
        return {"aggregation": "token_mean", "normalizer": _items_a_process(mask, num_items)}

    def _reference(
        self, ids: Tensor, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        if hidden is None or weight is None:
            name = "ref_input" if hidden is None else "ref_weight"
            raise ValueError(f"{name}: got None without ref_per_token_logps, expected a tensor")
        with torch.no_grad():
            return fk.linear_logprobs(hidden, weight, ids, bias, temperature=self.temperature)


def _items_a_process(mask: Tensor, num_items: float | Tensor | None) -> Tensor:
    """dapo's divisor: the tokens of all processes over the number of processes, at least 1."""
    processes = 1
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    if together:
        processes = torch.distributed.get_world_size()
    if num_items is None:
        total = (mask != 0).sum().float()
        if together:
            torch.distributed.all_reduce(total)
    else:
        total = torch.as_tensor(num_items, dtype=torch.float32, device=mask.device)
    return (total / processes).clamp(min=1)
