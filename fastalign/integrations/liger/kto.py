"""Liger's KTO on the head."""

import torch
from torch import Tensor, nn

import fastalign_kernels as fk

from ..whole_tensors import whole
from .preference import PairBatch, Result, reference_logps


class LigerFusedLinearKTOLoss(nn.Module):
    """`fastalign.linear_kto_loss` with Liger's options.

    Args:
        ignore_index, beta: as in `fastalign.linear_kto_loss`.
        compiled, chunk_size: change no value.
        use_ref_model: False: no reference, as if its log-probabilities were 0.
        average_log_prob: score means over tokens.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | None = None,
    ) -> Result:
        """The loss, and six sums without gradient. Unlike in Liger's other losses, _input comes first.

        Args:
            _input, lin_weight, target, bias: [S, T, H], [V, H], [S, T], [V].
            preference_labels: [S] bool, True for desirable completions. Required.
            kl: a scalar or [1] >= 0. None: 0.
        Returns:
            The loss, and the sums over the desirable and over the other completions of: log-probabilities,
            logits of all positions, rewards.
        """
        if preference_labels is None:
            raise ValueError("preference_labels: got None, expected [S] bool")
        batch = PairBatch(_input, lin_weight, target, bias, self.ignore_index)
        reference = reference_logps(
            target, ref_input, ref_weight, ref_bias, used=self.use_ref_model, ignore_index=self.ignore_index
        )
        kind = "apo_zero_unpaired" if kl is None else "kto"  # the first is KTO with a KL of 0
        if self.average_log_prob:
            lengths = batch.lengths()
            logps = batch.logps() / lengths
            scored = fk.kto_loss(
                logps, reference / lengths, preference_labels, kl, beta=self.beta, loss_type=kind
            )
            loss, rewards = scored
        else:
            loss, rewards, logps = fk.linear_kto_loss(
                *(_input, lin_weight, target, preference_labels, kl, bias),
                beta=self.beta,
                loss_type=kind,
                reference_logps=reference,
                ignore_index=self.ignore_index,
            )
        logits = _sums_of_logits(_input, lin_weight, bias)
        masks = (preference_labels, ~preference_labels)
        sums = [(values * mask).sum() for values in (logps.detach(), logits, rewards) for mask in masks]
        return loss, tuple(sums)


@torch.no_grad()
def _sums_of_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The sum of each row's logits [S], which is linear in the head."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    sums = hidden.sum(1, dtype=dtype) @ whole(weight.sum(0, dtype=dtype))
    return sums if bias is None else sums + hidden.shape[1] * whole(bias.sum(dtype=dtype))
