"""Liger's GRPO on the head."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastalign_kernels as fk
from fastalign_kernels import checks

from .grpo_gates import SapoTemperatures, VespoShape, sapo_losses, vespo_losses

SERVED = ("grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo", "vespo", "luspo")
# These weigh the ratio of each token, or of a completion, in a way of their own.
TOKEN_LEVEL = ("cispo", "sapo", "vespo")


class _Tokens(NamedTuple):
    """The tensors of a call beside the head's, [B, T] each.

    advantages are [B, T] or [B], and [B] for vespo, which alone has rollout_ratio, also [B, 1].
    """

    old: Tensor | None
    advantages: Tensor
    mask: Tensor
    reference: Tensor | None
    rollout_ratio: Tensor | None = None

    def kl_options(self, beta: float) -> dict[str, Any]:
        """`ppo_loss`'s options for the KL. Without a reference there is none."""
        coefficient = 0.0 if self.reference is None else beta
        return {"reference_logp": self.reference, "kl_coefficient": coefficient}


class LigerFusedLinearGRPOLoss(nn.Module):
    """`fastalign.linear_ppo_loss` with Liger's options, which weigh one advantage a completion.

    Args:
        beta: the weight of the KL, k3.
        compiled, chunk_size: change no value.
        use_ref_model: False: the KL is 0.
        epsilon_low, epsilon_high: `linear_ppo_loss`'s clip and clip_high. cispo bounds the ratio by
            epsilon_high itself, at least 1.
        loss_type: "grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo", "vespo", or "luspo" with "sequence" and
            without a KL: Liger divides luspo's KL and its token level by the padded length.
        max_completion_length: dr_grpo divides by it and by the number of completions.
        importance_sampling_level: "token", or "sequence" (GSPO). "sequence", cispo, sapo and vespo score
            the tokens first (`linear_logprobs`), which costs one GEMM more.
        sapo_temperature_pos, sapo_temperature_neg: > 0. Read with sapo.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: read with vespo.
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
        levels = ("token",) if loss_type in TOKEN_LEVEL else ("token", "sequence")
        if loss_type == "luspo":
            levels = ("sequence",)
        if importance_sampling_level not in levels:
            raise ValueError(
                f"importance_sampling_level: got {importance_sampling_level!r} with loss_type={loss_type!r}, "
                f"expected {' or '.join(repr(level) for level in levels)}"
            )
        if loss_type == "cispo" and (epsilon_high < 1 or delta is not None):
            got = f"epsilon_high={epsilon_high}, delta={delta}"
            raise ValueError(f"loss_type: got 'cispo' with {got}, expected epsilon_high >= 1 and no delta")
        if loss_type == "luspo" and beta and use_ref_model:
            raise ValueError(f"beta: got {beta} with loss_type='luspo', expected 0")
        if min(sapo_temperature_pos, sapo_temperature_neg) <= 0:
            got = f"sapo_temperature_pos={sapo_temperature_pos}, sapo_temperature_neg={sapo_temperature_neg}"
            raise ValueError(f"sapo_temperature: got {got}, expected both > 0")
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
        self.sapo = SapoTemperatures(sapo_temperature_pos, sapo_temperature_neg)
        self.vespo = VespoShape(vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg)
        self.sequence_level = importance_sampling_level == "sequence"
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
            vllm_is_ratio: [B, T], [B, 1] or [B], >= 0. Multiplies each token's policy loss, or vespo's weight
                of a completion. Not [B, T] with luspo.
            num_items_in_batch: the divisor of dapo over all processes. None: the mask's tokens.
        """
        checks.tensors(
            selected_token_ids=selected_token_ids, attention_mask=attention_mask, advantages=advantages
        )
        ratio = vllm_is_ratio
        if ratio is not None and ratio.dim() == 1:
            ratio = ratio[:, None]
        if ratio is not None and self.loss_type == "luspo" and ratio.shape[-1] != 1:
            raise ValueError(
                f"vllm_is_ratio: got shape {list(ratio.shape)} with loss_type='luspo', expected [B, 1] or [B]"
            )
        if ratio is not None and self.loss_type != "vespo":
            advantages = (advantages[:, None] * ratio).expand(selected_token_ids.shape)
        reference = None
        if self.beta and self.use_ref_model:
            reference = ref_per_token_logps
            if reference is None:
                scored_ids = selected_token_ids.where(attention_mask != 0, -100)
                reference = self._reference(scored_ids, ref_input, ref_weight, ref_bias)
        head = (_input, lin_weight, selected_token_ids, bias)
        batch = _Tokens(old_per_token_logps, advantages, attention_mask, reference, ratio)
        aggregation = self._aggregation(attention_mask, num_items_in_batch)
        if self.sequence_level or self.loss_type in TOKEN_LEVEL:
            loss, kl, clipped = self._from_logps(head, batch, aggregation)
        else:
            scored = fk.linear_ppo_loss(
                _input,
                lin_weight,
                selected_token_ids,
                old_per_token_logps,
                advantages,
                attention_mask,
                bias,
                temperature=self.temperature,
                **batch.kl_options(self.beta),
                **self.clips,
                **aggregation,
            )
            loss, kl, clipped = scored.loss, scored.kl, scored.clip_fraction
        if not self.beta:
            return loss, (clipped,)
        return loss, (loss.new_zeros(()) if kl is None else kl, clipped)

    def _from_logps(
        self,
        head: tuple[Tensor, Tensor, Tensor, Tensor | None],
        batch: "_Tokens",
        aggregation: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The loss, the KL and the share of clipped tokens of the losses that need the log-probabilities."""
        hidden, weight, ids, bias = head
        inside = batch.mask != 0
        logp = fk.linear_logprobs(hidden, weight, ids.where(inside, -100), bias, temperature=self.temperature)
        zeros = torch.zeros_like(logp)
        old = logp.detach() if batch.old is None else batch.old
        kl_term = fk.ppo_loss(logp, None, zeros, inside, **batch.kl_options(self.beta), **aggregation)
        if self.sequence_level:
            mean, old_mean = (_row_means(values, inside) for values in (logp, old))
            policy = fk.ppo_loss(mean, old_mean, batch.advantages, inside, **self.clips, **aggregation)
            return policy.loss + kl_term.loss, kl_term.kl, policy.clip_fraction
        if self.loss_type != "cispo":
            losses = self._gated(logp, old, batch, inside)
            loss = kl_term.loss + _aggregated(losses, inside, **aggregation)
            return loss, kl_term.kl, loss.new_zeros(())
        high = self.clips["clip_high"]
        counted = fk.ppo_loss(logp.detach(), old, batch.advantages, inside, clip=None, clip_high=high - 1)
        ratio = (logp.detach() - old).exp().clamp(max=high)
        weights = (ratio * batch.advantages.view(len(ids), -1)).where(inside, 0)
        loss = kl_term.loss - (weights * logp).sum() / aggregation["normalizer"]
        return loss, kl_term.kl, counted.clip_fraction

    def _gated(self, logp: Tensor, old: Tensor, batch: "_Tokens", inside: Tensor) -> Tensor:
        """The policy losses of sapo or vespo, [B, T]."""
        if self.loss_type == "vespo":
            return vespo_losses(logp, old, batch.advantages, inside, batch.rollout_ratio, self.vespo)
        advantages = batch.advantages.view(len(logp), -1).expand_as(logp)
        return sapo_losses(logp, old, advantages, inside, self.sapo)

    def _aggregation(self, mask: Tensor, num_items: float | Tensor | None) -> dict[str, Any]:
        """`linear_ppo_loss`'s options for the loss type."""
        B = mask.shape[0]
        if self.loss_type in ("grpo", "sapo"):
            return {"aggregation": "sequence_mean", "normalizer": B}
        if self.loss_type == "luspo":
            return {"aggregation": "sum", "normalizer": B}
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


def _aggregated(losses: Tensor, inside: Tensor, aggregation: str, normalizer: float | Tensor) -> Tensor:
    """The losses of tokens as one number, by `ppo_loss`'s aggregation."""
    sums = losses.where(inside, 0).sum(-1)
    if aggregation == "sequence_mean":
        sums = sums / inside.sum(-1).clamp(min=1)
    return sums.sum() / normalizer


def _row_means(values: Tensor, inside: Tensor) -> Tensor:
    """Each row's mean over its tokens, at each of its positions [B, T]."""
    sums = values.where(inside, 0).sum(-1, keepdim=True)
    return (sums / inside.sum(-1, keepdim=True).clamp(min=1)).expand_as(values)


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
