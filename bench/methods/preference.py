"""DPO and KTO from hidden states, with the reference's pass, and the reward model's loss from scores.

N tokens are PAIRS chosen rows and then as many rejected rows, all of one length: the only layout that Liger
takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastalign
from fastalign_kernels import linear_dpo_loss, linear_kto_loss

from ..core.operation import (
    COMPILED,
    EAGER,
    EXPONENTS,
    OURS,
    Forward,
    Operation,
    Shape,
    Tensors,
    compiled,
    here,
    module,
)
from .head import HEAD_ROWS, eager_logprobs, head_inputs, trl_chunked

PAIRS = 2
ROWS = 2 * PAIRS
BETA = 0.1
LIGER_DPO = "LigerFusedLinearDPOLoss"
LIGER_KTO = "LigerFusedLinearKTOLoss"
TRL = "TRL ChunkedLogProbFunction, plain loss"

# Log-probabilities [ROWS] of policy and reference, and all inputs -> losses.
Losses = Callable[[Tensor, Tensor, Tensors], Tensor]


def pair_inputs(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Inputs whose reference logits differ by a tenth from the policy's, as after some training.

    The margin is then about 0.6 at 512 tokens a row. For two unrelated models it would be 9, where the
    sigmoid is flat and a pair's gradients vanish.
    """
    return with_reference(head_inputs(shape._replace(N=shape.N // ROWS * ROWS), dtype, device), dtype, device)


def with_reference(tensors: dict[str, Tensor], dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """The tensors with the reference's hidden states and weight added."""
    generator = torch.Generator(device).manual_seed(1)
    for name in ("hidden", "weight"):
        policy = tensors[name]
        # 0.07 of both factors moves the logits by a tenth.
        noise = torch.randn(policy.shape, generator=generator, device=device) * policy.float().std() * 0.07
        tensors[f"reference_{name}"] = (policy.float() + noise).to(dtype)
    return tensors


def unpaired_inputs(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    desirable = torch.arange(ROWS, device=device) % 2 == 0
    return {
        **pair_inputs(shape, dtype, device),
        "desirable": desirable,
        "kl": torch.tensor(2.0, device=device),
    }


def by_row(tensors: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """hidden and reference_hidden [ROWS, T, H], ids [ROWS, T]."""
    hidden, reference, ids = (
        tensors[name].unflatten(0, (ROWS, -1)) for name in ("hidden", "reference_hidden", "ids")
    )
    return hidden, reference, ids


def _ours_dpo(**tensors: Tensor) -> dict[str, Tensor]:
    hidden, reference, ids = by_row(tensors)
    options: Any = {
        "reference_hidden": reference,
        "reference_weight": tensors["reference_weight"],
        "beta": BETA,
    }
    return {"loss": linear_dpo_loss(hidden, tensors["weight"], ids, **options).loss}


def _ours_kto(**tensors: Tensor) -> dict[str, Tensor]:
    hidden, reference, ids = by_row(tensors)
    options: Any = {
        "reference_hidden": reference,
        "reference_weight": tensors["reference_weight"],
        "beta": BETA,
    }
    return {
        "loss": linear_kto_loss(
            hidden, tensors["weight"], ids, tensors["desirable"], tensors["kl"], **options
        ).loss
    }


def _dpo(policy: Tensor, reference: Tensor, tensors: Tensors) -> Tensor:
    chosen, rejected = (policy - reference).unflatten(0, (2, PAIRS))
    return -F.logsigmoid(BETA * (chosen - rejected))


def _kto(policy: Tensor, reference: Tensor, tensors: Tensors) -> Tensor:
    above = BETA * (policy - reference - tensors["kl"])
    return 1 - torch.sigmoid(torch.where(tensors["desirable"], above, -above))


def _plain(losses: Losses, logprobs: Forward, *, exponents: bool = False) -> Forward:
    """The loss on log-probabilities of any method; `exponents` adds EXPONENTS to its results."""

    def forward(**tensors: Tensor) -> dict[str, Tensor]:
        def rows(hidden: Tensor, weight: Tensor) -> Tensor:
            return (
                logprobs(hidden=hidden, weight=weight, ids=tensors["ids"])["logp"]
                .unflatten(0, (ROWS, -1))
                .sum(-1)
            )

        with torch.no_grad():
            reference = rows(tensors["reference_hidden"], tensors["reference_weight"])
        policy = rows(tensors["hidden"], tensors["weight"])
        loss = {"loss": losses(policy, reference, tensors).mean()}
        return {**loss, EXPONENTS: BETA * torch.cat([policy, reference])} if exponents else loss

    return forward


def _some_at_a_time(rows: int) -> Forward:
    """Plain log-probabilities of so many tokens at a time, recomputed for the gradients."""

    def one(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        return eager_logprobs(hidden, weight, ids)["logp"]

    def logprobs(hidden: Tensor, weight: Tensor, ids: Tensor) -> dict[str, Tensor]:
        parts = zip(hidden.split(rows), ids.split(rows))
        return {"logp": torch.cat([checkpoint(one, x, weight, y, use_reentrant=False) for x, y in parts])}

    return logprobs


def _trl(losses: Losses) -> Callable[[str], Forward]:
    return lambda device: _plain(losses, trl_chunked(device))


def _liger_dpo(device: str) -> Forward:
    """Liger's DPO. It compiles its pieces; on a CPU it runs uncompiled, as in Liger's tests."""
    loss = module("liger_kernel.chunked_loss", "liger-kernel").LigerFusedLinearDPOLoss(
        beta=BETA, compiled=device != "cpu"
    )

    def forward(**tensors: Tensor) -> dict[str, Tensor]:
        hidden, reference, ids = by_row(tensors)
        return {
            "loss": loss(
                tensors["weight"], hidden, ids, ref_input=reference, ref_weight=tensors["reference_weight"]
            )[0]
        }

    return forward


def _liger_kto(device: str) -> Forward:
    """Liger's KTO, which takes hidden states before the weight, unlike its DPO."""
    kto = module("liger_kernel.chunked_loss", "liger-kernel").LigerFusedLinearKTOLoss
    loss = kto(beta=BETA, compiled=device != "cpu", use_ref_model=True)

    def forward(**tensors: Tensor) -> dict[str, Tensor]:
        hidden, reference, ids = by_row(tensors)
        labels = {"preference_labels": tensors["desirable"], "kl": tensors["kl"]}
        return {
            "loss": loss(
                hidden,
                tensors["weight"],
                ids,
                ref_input=reference,
                ref_weight=tensors["reference_weight"],
                **labels,
            )[0]
        }

    return forward


# The reward model's loss from scores of shape.N pairs. Liger has none, and TRL's RewardTrainer computes the
# same as PyTorch's row.


def score_inputs(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    scores = torch.randn(2, shape.N, generator=generator, device=device).to(dtype)
    return {"chosen": scores[0].clone(), "rejected": scores[1].clone()}


def _ours_reward(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    return {"loss": fastalign.reward_loss(chosen, rejected).loss}


def _eager_reward(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    return {"loss": -F.logsigmoid(chosen - rejected).mean()}


def _preference(
    inputs: Callable[[Shape, torch.dtype, str], dict[str, Tensor]],
    ours: Forward,
    losses: Losses,
    liger: dict[str, Callable[[str], Forward]],
) -> Operation:
    plain = _plain(losses, eager_logprobs)
    return Operation(
        inputs,
        {OURS: here(ours), EAGER: here(plain), COMPILED: compiled(plain), TRL: _trl(losses), **liger},
        (*HEAD_ROWS, "reference_hidden"),
        whole=lambda rows: _plain(losses, _some_at_a_time(rows), exponents=True),
    )


PREFERENCE = {
    "linear_dpo": _preference(pair_inputs, _ours_dpo, _dpo, {LIGER_DPO: _liger_dpo}),
    "linear_kto": _preference(unpaired_inputs, _ours_kto, _kto, {LIGER_KTO: _liger_kto}),
    "reward": Operation(
        score_inputs,
        {OURS: here(_ours_reward), EAGER: here(_eager_reward), COMPILED: compiled(_eager_reward)},
        ("chosen", "rejected"),
    ),
}
