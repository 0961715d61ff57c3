"""Liger 0.8.5's losses for `host_values` and the tests: inputs, options, and formulas on the logits in fp64.

Each formula says what Liger's class computes, ignored positions and means included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign.integrations.liger.preference import LIGER_DPO_TYPES
from fastalign_kernels.preference.reference import PAIR_REFERENCES

S, T, H, V = 3, 5, 4, 11  # pairs, positions, hidden size, vocabulary
PAIRED = ("DPO", "CPO", "ORPO", "SimPO")
GRPO_TYPES = ("grpo", "bnpo", "dapo", "dr_grpo")


def tensors(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """2S rows of a head and of a reference's, with ignored positions at the rows' ends."""
    torch.manual_seed(0)
    target = torch.randint(V, (2 * S, T))
    for row in range(2 * S):
        target[row, T - row % 3 :] = -100
    return {
        "weight": torch.randn(V, H, dtype=dtype, requires_grad=True),
        "hidden": torch.randn(2 * S, T, H, dtype=dtype, requires_grad=True),
        "target": target,
        "bias": torch.randn(V, dtype=dtype, requires_grad=True),
        "ref_hidden": torch.randn(2 * S, T, H, dtype=dtype),
        "ref_weight": torch.randn(V, H, dtype=dtype),
        "ref_bias": torch.randn(V, dtype=dtype),
        "labels": torch.tensor([True, False, True, True, False, False]),
        "advantages": torch.randn(2 * S, dtype=dtype),
        "old": -2 - torch.rand(2 * S, T, dtype=dtype),
        "ratio": torch.rand(2 * S, T, dtype=dtype) + 0.5,
        "kl": torch.tensor(0.3, dtype=dtype),
    }


def call(module: Any, given: dict[str, Tensor], **extra: Any) -> tuple[Tensor, Sequence[Tensor]]:
    """A loss called as Liger's callers do: by position, each class in its own order."""
    names = ["weight", "hidden", "target", "bias"]
    kind = type(module).__name__
    if "DPO" in kind:
        names += ["ref_hidden", "ref_weight", "ref_bias"]
    if "KTO" in kind:
        names = ["hidden", "weight", "target", "bias", "labels", "ref_hidden", "ref_weight", "ref_bias"]
    if "GRPO" not in kind:
        return module(*[given[name] for name in names], **extra)
    mask = given["target"] >= 0
    ids = given["target"].clamp(min=0)
    first = (given["hidden"], given["weight"], ids, mask.long(), given["advantages"], given["bias"])
    reference = (None, given["old"], given["ref_hidden"], given["ref_weight"], given["ref_bias"])
    return module(*first, *reference, **extra)


def cases() -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """A loss, options of its constructor, and arguments of its call."""
    rows: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
    for loss_type in LIGER_DPO_TYPES:
        smoothing = {"label_smoothing": 0.1} if loss_type in ("robust", "exo_pair") else {}
        rows.append(("DPO", {"loss_type": loss_type, **smoothing}, {}))
    rows += [
        ("DPO", {"use_ref_model": False}, {}),
        ("DPO", {"average_log_prob": True, "beta": 0.7}, {}),
        ("DPO", {"compute_nll_loss": True, "alpha": 0.3}, {}),
        ("CPO", {"alpha": 0.3, "label_smoothing": 0.1}, {}),
        ("CPO", {"average_log_prob": True, "compute_nll_loss": False}, {}),
        ("SimPO", {"beta": 2.0, "gamma": 0.4, "alpha": 0.3, "label_smoothing": 0.1}, {}),
        ("SimPO", {}, {}),
        ("ORPO", {"beta": 0.3}, {}),
        ("ORPO", {}, {"nll_target": torch.arange(2 * S * T).view(2 * S, T) % V}),
        ("ORPO", {"compute_nll_loss": False}, {}),
        ("KTO", {}, {}),
        ("KTO", {"use_ref_model": True}, {"kl": torch.tensor(0.3)}),
        ("KTO", {"use_ref_model": True, "average_log_prob": True, "beta": 0.7}, {"kl": torch.tensor(0.3)}),
    ]
    for loss_type in GRPO_TYPES:
        rows.append(("GRPO", {"loss_type": loss_type, "max_completion_length": 9}, {}))
    rows += [
        ("GRPO", {"beta": 0.0, "epsilon_high": 0.3, "delta": 1.5}, {}),
        ("GRPO", {"use_ref_model": False, "temperature": 0.7}, {"num_items_in_batch": 50}),
        ("GRPO", {}, {"vllm_is_ratio": tensors()["ratio"].float()}),
        ("GRPO", {"loss_type": "grpo"}, {"vllm_is_ratio": tensors()["ratio"][:, 0].float()}),
        ("GRPO", {"loss_type": "cispo", "epsilon_high": 3.0}, {}),
        ("GRPO", {"importance_sampling_level": "sequence"}, {"vllm_is_ratio": tensors()["ratio"].float()}),
        ("GRPO", {"importance_sampling_level": "sequence", "loss_type": "grpo", "delta": 1.5}, {}),
        ("GRPO", {"loss_type": "sapo"}, {}),
        (
            "GRPO",
            {"loss_type": "sapo", "sapo_temperature_pos": 0.7},
            {"vllm_is_ratio": tensors()["ratio"].float()},
        ),
        ("GRPO", {"loss_type": "vespo"}, {}),
        (
            "GRPO",
            {"loss_type": "vespo", "vespo_k_neg": 1.3, "vespo_lambda_pos": 0.5},
            {"vllm_is_ratio": tensors()["ratio"][:, 0].float(), "num_items_in_batch": 50},
        ),
        ("GRPO", {"loss_type": "luspo", "importance_sampling_level": "sequence", "beta": 0.0}, {}),
    ]
    return rows


def logps(given: dict[str, Tensor], prefix: str = "", temperature: float = 1.0) -> Tensor:
    """Log-probabilities [2S, T], 0 where ignored."""
    bias = given[f"{prefix}bias"]
    logits = (given[f"{prefix}hidden"] @ given[f"{prefix}weight"].T + bias) / temperature
    target = given["target"]
    picked = logits.log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
    return picked * (target >= 0)


def pair_formula(
    loss: str, given: dict[str, Tensor], options: dict[str, Any], nll_target: Tensor | None = None
) -> Tensor:
    """The paired losses of Liger 0.8.5 in fp64."""
    beta, smoothing = options.get("beta", 0.1), options.get("label_smoothing", 0.0)
    tokens = logps(given)
    lengths = (given["target"] >= 0).sum(-1)
    mean = loss in ("ORPO", "SimPO") or options.get("average_log_prob", False)
    divisor = lengths if mean else 1
    chosen, rejected = (tokens.sum(-1) / divisor).chunk(2)
    if loss == "DPO":
        reference = logps(given, "ref_").sum(-1) / divisor
        c, r = chosen - reference[:S], rejected - reference[S:]
        if not options.get("use_ref_model", True):
            c, r = chosen, rejected
        value = PAIR_REFERENCES[options.get("loss_type", "sigmoid")](c, r, beta, smoothing).mean()
    elif loss == "ORPO":
        odds = [x - torch.log1p(-x.exp()) for x in (chosen, rejected)]
        value = -beta * F.logsigmoid(odds[0] - odds[1]).mean()
    else:
        x = beta * (chosen - rejected) - (options.get("gamma", 0.5) if loss == "SimPO" else 0.0)
        value = (-(1 - smoothing) * F.logsigmoid(x) - smoothing * F.logsigmoid(-x)).mean()
    if options.get("compute_nll_loss", loss != "DPO"):
        nll_target = given["target"] if nll_target is None else nll_target
        number = (nll_target[:S] >= 0).sum()
        value = value - options.get("alpha", 1.0) * logps({**given, "target": nll_target})[:S].sum() / number
    return value


def kto_formula(given: dict[str, Tensor], options: dict[str, Any], kl: Tensor | None = None) -> Tensor:
    lengths = (given["target"] >= 0).sum(-1)
    ratio = logps(given).sum(-1)
    if options.get("use_ref_model"):
        ratio = ratio - logps(given, "ref_").sum(-1)
    ratio = ratio / lengths if options.get("average_log_prob") else ratio
    sign = torch.where(given["labels"], 1, -1)
    shifted = ratio if kl is None else ratio - kl
    return (1 - torch.sigmoid(options.get("beta", 0.1) * shifted * sign)).mean()


def grpo_formula(
    given: dict[str, Tensor],
    options: dict[str, Any],
    vllm_is_ratio: Tensor | None = None,
    num_items_in_batch: int | None = None,
) -> Tensor:
    mask = given["target"] >= 0
    temperature, beta = options.get("temperature", 1.0), options.get("beta", 0.04)
    tokens = logps(given, temperature=temperature)
    log_ratio = tokens - given["old"]
    if options.get("importance_sampling_level") == "sequence":
        log_ratio = ((log_ratio * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)).expand_as(mask)
    ratio, high = log_ratio.exp(), options.get("epsilon_high", 0.2)
    advantages, kind = given["advantages"][:, None], options.get("loss_type", "dapo")
    if kind == "cispo":
        losses = -ratio.clamp(max=high).detach() * advantages * tokens
    elif kind == "sapo":
        positive, negative = (
            options.get(f"sapo_temperature_{sign}", x) for sign, x in (("pos", 1.0), ("neg", 1.05))
        )
        tau = torch.full_like(advantages, negative).masked_fill(advantages > 0, positive)
        losses = -4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantages
    elif kind == "vespo":
        weight = (log_ratio * mask).sum(-1, keepdim=True)
        if vllm_is_ratio is not None:
            weight, vllm_is_ratio = weight + vllm_is_ratio.double().log()[:, None], None
        defaults = {"k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 3.0, "lambda_neg": 2.0}
        shape = {name: options.get(f"vespo_{name}", value) for name, value in defaults.items()}
        k, decay = (
            torch.full_like(advantages, shape[f"{name}_neg"]).masked_fill(
                advantages >= 0, shape[f"{name}_pos"]
            )
            for name in ("k", "lambda")
        )
        phi = (decay + k * weight - decay * weight.exp()).exp().detach()
        losses = -phi * advantages * tokens
    else:
        clipped = ratio.clamp(0.8, 1 + high)
        bounded = ratio.clamp(max=options.get("delta", torch.inf))
        losses = -torch.minimum(bounded * advantages, clipped * advantages)
    if vllm_is_ratio is not None:
        losses = losses * (vllm_is_ratio if vllm_is_ratio.dim() == 2 else vllm_is_ratio[:, None]).double()
    if beta and options.get("use_ref_model", True):
        d = logps(given, "ref_", temperature) - tokens
        losses = losses + beta * (d.exp() - d - 1)
    losses = losses * mask
    if kind == "luspo":
        return losses.sum() / (2 * S)
    if kind in ("grpo", "sapo"):
        return (losses.sum(-1) / mask.sum(-1)).mean()
    number = num_items_in_batch or mask.sum()
    return losses.sum() / (2 * S * 9 if kind == "dr_grpo" else number)


def expected_loss(
    loss: str, given: dict[str, Tensor], options: dict[str, Any], extra: dict[str, Any]
) -> Tensor:
    """The loss of a row of `cases`."""
    if loss in PAIRED:
        return pair_formula(loss, given, options, **extra)
    if loss == "KTO":
        return kto_formula(given, options, **extra)
    return grpo_formula(given, options, **extra)
