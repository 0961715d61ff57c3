"""Liger's losses of preference pairs on the head: DPO, CPO, ORPO and SimPO.

Rows are [2S, T, H] and [2S, T], the S chosen rows first. Each call returns the loss and a tuple without
gradient: chosen_logps, rejected_logps [S], chosen_logits_mean, rejected_logits_mean, nll_loss, and what the
loss adds to it.
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastalign_kernels as fk

from ..whole_tensors import whole

Result = tuple[Tensor, tuple[Tensor, ...]]
LIGER_DPO_TYPES = (
    "sigmoid",
    "hinge",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
)


class PairBatch(NamedTuple):
    """A call's arguments in fastalign's order."""

    hidden: Tensor  # [2S, T, H]
    weight: Tensor  # [V, H]
    target: Tensor  # [2S, T]
    bias: Tensor | None  # [V]
    ignore_index: int

    @property
    def pairs(self) -> int:
        return self.target.shape[0] // 2

    def lengths(self) -> Tensor:
        """Tokens [2S] that are not ignored."""
        return (self.target != self.ignore_index).sum(-1)

    def logps(self) -> Tensor:
        """Log-probabilities of each row [2S], summed over its tokens. Differentiable."""
        return fk.linear_logprobs(*self[:4], ignore_index=self.ignore_index).sum(-1)

    def nll(self, logps: Tensor, nll_target: Tensor | None = None) -> Tensor:
        """Mean negative log-likelihood of the chosen rows' tokens, or of other targets [2S, T]."""
        S = self.pairs
        if nll_target is None:
            return -logps[:S].sum() / self.lengths()[:S].sum()
        chosen = (self.hidden[:S], self.weight, nll_target[:S], self.bias)
        return fk.linear_cross_entropy(*chosen, ignore_index=self.ignore_index)

    def result(self, loss: Tensor, logps: Tensor, nll: Tensor, extra: tuple[Tensor, ...]) -> Result:
        """What Liger returns. The means of logits cover ignored positions too."""
        S = self.pairs
        means = [mean_logit(rows, self.weight, self.bias) for rows in (self.hidden[:S], self.hidden[S:])]
        beside = (logps[:S], logps[S:], *means, nll, *extra)
        return loss, tuple(value.detach() for value in beside)


class LigerFusedLinearDPOLoss(nn.Module):
    """`fastalign.linear_dpo_loss` with Liger's options.

    Args:
        ignore_index, beta: as in `fastalign.linear_dpo_loss`.
        alpha: the weight of the chosen rows' NLL, if compute_nll_loss.
        compute_nll_loss, average_log_prob: cost one GEMM more, and average_log_prob scores means over tokens.
        compiled, chunk_size: change no value.
        use_ref_model: False: no reference, as if its log-probabilities were 0.
        loss_type: Liger's ten.
        label_smoothing: as in `fastalign.dpo_loss`. Refused with "sigmoid", where Liger ignores it and
            `fastalign.linear_dpo_loss` computes cDPO.
        discopop_tau: 0.05.
    Raises:
        ValueError: an option that is not served.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ) -> None:
        super().__init__()
        if loss_type not in LIGER_DPO_TYPES:
            raise ValueError(f"loss_type: got {loss_type!r}, expected one of {', '.join(LIGER_DPO_TYPES)}")
        if loss_type == "sigmoid" and label_smoothing:
            raise ValueError(
                f"label_smoothing: got {label_smoothing} with loss_type='sigmoid', where Liger ignores it, "
                "expected 0; fastalign.linear_dpo_loss computes cDPO"
            )
        if discopop_tau != 0.05:
            raise ValueError(f"discopop_tau: got {discopop_tau}, expected 0.05")
        self.ignore_index = ignore_index
        self.alpha = alpha
        self.compute_nll_loss = compute_nll_loss
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.options: dict[str, Any] = {
            "beta": beta,
            "loss_type": loss_type,
            "label_smoothing": label_smoothing,
        }

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> Result:
        """The loss, and a tuple that ends with chosen_rewards and rejected_rewards [S]."""
        batch = PairBatch(_input, lin_weight, target, bias, self.ignore_index)
        reference = self._reference(target, ref_input, ref_weight, ref_bias)
        if not (self.compute_nll_loss or self.average_log_prob):
            scored = fk.linear_dpo_loss(
                *batch[:4], ignore_index=self.ignore_index, reference_logps=reference, **self.options
            )
            logps = torch.cat([scored.chosen_logps, scored.rejected_logps])
            return batch.result(scored.loss, logps, logps.new_zeros(()), scored[1:3])
        sums, S = batch.logps(), batch.pairs
        logps = sums
        if self.average_log_prob:
            logps, reference = sums / batch.lengths(), reference / batch.lengths()
        pairs = fk.dpo_loss(logps[:S], logps[S:], reference[:S], reference[S:], **self.options)
        loss, nll = pairs.loss, sums.new_zeros(())
        if self.compute_nll_loss:
            nll = batch.nll(sums)
            loss = loss + self.alpha * nll
        return batch.result(loss, logps, nll, pairs[1:])

    def _reference(
        self, target: Tensor, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """The reference's log-probabilities [2S], summed over tokens."""
        return reference_logps(
            target, hidden, weight, bias, used=self.use_ref_model, ignore_index=self.ignore_index
        )


class _ReferenceFree(nn.Module, ABC):
    """What CPO, ORPO and SimPO share."""

    def __init__(self, ignore_index: int, *, alpha: float, compute_nll_loss: bool) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.alpha = alpha
        self.compute_nll_loss = compute_nll_loss

    @abstractmethod
    def pair_loss(self, sums: Tensor, lengths: Tensor) -> tuple[fk.PreferenceLoss, Tensor]:
        """The loss of the pairs without the NLL, and the log-probabilities [2S] that Liger returns."""

    def extra(self, scored: fk.PreferenceLoss, logps: Tensor) -> tuple[Tensor, ...]:
        """What the loss adds to Liger's tuple."""
        return scored.chosen_rewards, scored.rejected_rewards

    def run(self, batch: PairBatch, nll_target: Tensor | None = None) -> Result:
        sums = batch.logps()
        scored, logps = self.pair_loss(sums, batch.lengths())
        loss, nll = scored.loss, sums.new_zeros(())
        if self.compute_nll_loss:
            nll = batch.nll(sums, nll_target)
            loss = loss + self.alpha * nll
        return batch.result(loss, logps, nll, self.extra(scored, logps))


class LigerFusedLinearCPOLoss(_ReferenceFree):
    """`fastalign.cpo_loss` on the head with Liger's options.

    Args:
        ignore_index: the id of tokens that are not scored.
        beta, label_smoothing: as in `fastalign.cpo_loss`.
        alpha: the weight of the NLL, which is a mean over the batch's chosen tokens, if compute_nll_loss.
        average_log_prob: compare means over tokens.
        compiled, chunk_size: change no value.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(ignore_index, alpha=alpha, compute_nll_loss=compute_nll_loss)
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.average_log_prob = average_log_prob

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Result:
        """The loss, and a tuple that ends with chosen_rewards and rejected_rewards [S]."""
        return self.run(PairBatch(_input, lin_weight, target, bias, self.ignore_index))

    def pair_loss(self, sums: Tensor, lengths: Tensor) -> tuple[fk.PreferenceLoss, Tensor]:
        logps, S = sums / lengths if self.average_log_prob else sums, len(sums) // 2
        smoothing = self.label_smoothing
        scored = fk.cpo_loss(logps[:S], logps[S:], beta=self.beta, alpha=0.0, label_smoothing=smoothing)
        return scored, logps


class LigerFusedLinearSimPOLoss(_ReferenceFree):
    """`fastalign.simpo_loss` on the head with Liger's options.

    Args:
        ignore_index: the id of tokens that are not scored.
        beta, gamma, label_smoothing: as in `fastalign.simpo_loss`.
        alpha: the weight of the NLL, which is a mean over the batch's chosen tokens, if compute_nll_loss.
        compiled, chunk_size: change no value.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(ignore_index, alpha=alpha, compute_nll_loss=compute_nll_loss)
        self.options: dict[str, Any] = {"beta": beta, "gamma": gamma, "label_smoothing": label_smoothing}

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Result:
        """The loss, and a tuple that ends with chosen_rewards and rejected_rewards [S]."""
        return self.run(PairBatch(_input, lin_weight, target, bias, self.ignore_index))

    def pair_loss(self, sums: Tensor, lengths: Tensor) -> tuple[fk.PreferenceLoss, Tensor]:
        S = len(sums) // 2
        counts: dict[str, Any] = {"chosen_lengths": lengths[:S], "rejected_lengths": lengths[S:]}
        return fk.simpo_loss(sums[:S], sums[S:], alpha=0.0, **counts, **self.options), sums / lengths


class LigerFusedLinearORPOLoss(_ReferenceFree):
    """`fastalign.orpo_loss` on the head with Liger's options.

    Args:
        ignore_index: the id of tokens that are not scored.
        beta: as in `fastalign.orpo_loss`.
        compute_nll_loss: add the NLL, a mean over the batch's chosen tokens.
        compiled, chunk_size: change no value.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(ignore_index, alpha=1.0, compute_nll_loss=compute_nll_loss)
        self.beta = beta

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> Result:
        """The loss, and a tuple that ends with the rewards [S], log_odds_ratio and log_odds_chosen.

        nll_target: [2S, T], the targets of the NLL if they are others, such as the prompt's too.
        """
        batch = PairBatch(_input, lin_weight, target, bias, self.ignore_index)
        return self.run(batch, nll_target)

    def pair_loss(self, sums: Tensor, lengths: Tensor) -> tuple[fk.PreferenceLoss, Tensor]:
        S = len(sums) // 2
        counts: dict[str, Any] = {"chosen_lengths": lengths[:S], "rejected_lengths": lengths[S:]}
        return fk.orpo_loss(sums[:S], sums[S:], beta=self.beta, alpha=0.0, **counts), sums / lengths

    def extra(self, scored: fk.PreferenceLoss, logps: Tensor) -> tuple[Tensor, ...]:
        odds = logps.detach() - torch.log1p(-logps.detach().exp())
        chosen, rejected = odds.chunk(2)
        return (*super().extra(scored, logps), -scored.loss / self.beta, (chosen - rejected).mean())


def reference_logps(
    target: Tensor,
    hidden: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    used: bool,
    ignore_index: int,
) -> Tensor:
    """A reference's log-probabilities of each row, summed over its tokens; 0 if it is not used.

    Raises:
        ValueError: it is used, and its hidden states or its head are missing.
    """
    if not used:
        return torch.zeros(target.shape[0], device=target.device)
    if hidden is None or weight is None:
        name = "ref_input" if hidden is None else "ref_weight"
        raise ValueError(f"{name}: got None with use_ref_model=True, expected a tensor")
    with torch.no_grad():
        return fk.linear_logprobs(hidden, weight, target, bias, ignore_index=ignore_index).sum(-1)


@torch.no_grad()
def mean_logit(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The mean over positions and ids of the logits, which is linear in the head."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    H = hidden.shape[-1]
    mean = (hidden.reshape(-1, H).mean(0, dtype=dtype) * whole(weight.mean(0, dtype=dtype))).sum()
    return mean if bias is None else mean + whole(bias.mean(dtype=dtype))
