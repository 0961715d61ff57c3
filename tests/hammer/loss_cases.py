"""Cases of the preference and policy losses."""

import math
from typing import Any

import torch
from torch import Tensor

import fastalign_kernels as k
from fastalign_kernels.policy.arguments import AGGREGATIONS
from fastalign_kernels.policy.ops import KL_ESTIMATORS
from fastalign_kernels.policy.reference import gae_ref, masked_whiten_ref, ppo_loss_ref, value_loss_ref
from fastalign_kernels.preference.formulas import DPO_LOSS_TYPES, PAIR_LOSSES
from fastalign_kernels.preference.reference import (
    cpo_loss_ref,
    dpo_loss_ref,
    kto_loss_ref,
    orpo_loss_ref,
    reward_loss_ref,
    simpo_loss_ref,
)
from tests.hammer.case import Case, Random, floats, log_uniform, maybe, size, spoil, truths, whole

# Losses of sequences.


def pair_options(r: Random) -> dict[str, Any]:
    loss_type = r.choice(DPO_LOSS_TYPES)
    smoothed = loss_type in ("sigmoid", "sigmoid_norm", "robust", "exo_pair")
    smoothing = r.uniform(1e-3, 0.45) if loss_type == "exo_pair" or (smoothed and r.random() < 0.5) else 0.0
    return {"beta": log_uniform(r, 0.01, 3), "loss_type": loss_type, "label_smoothing": smoothing}


def logps(r: Random, dtype: torch.dtype, S: int) -> Tensor:
    return spoil(r, -floats(r, (S,), dtype, r.choice((1e-3, 3, 30, 1000))).abs(), -math.inf, math.nan)


def lengths(r: Random, S: int) -> Tensor:
    return whole(r, 60, (S,))


def pairs(r: Random, dtype: torch.dtype) -> Case:
    S = size(r, 50)
    names = (
        "policy_chosen_logps",
        "policy_rejected_logps",
        "reference_chosen_logps",
        "reference_rejected_logps",
    )
    tensors = {name: logps(r, dtype, S) for name in names}
    reduction = {"reduction": r.choice(("mean", "sum", "none"))}
    kind = r.choice(("dpo", "dpo", "simpo", "orpo", "cpo"))
    if kind == "dpo":
        options = pair_options(r) | reduction
        need = PAIR_LOSSES[options["loss_type"]].lengths
        if need == "needed" or (need != "refused" and r.random() < 0.5):
            tensors |= {"chosen_lengths": lengths(r, S), "rejected_lengths": lengths(r, S)}
        return Case(tensors, options, names[:2], k.dpo_loss, dpo_loss_ref)
    tensors = {name: tensors[name] for name in names[:2]}
    options = {"beta": log_uniform(r, 0.05, 4), "alpha": r.uniform(0, 2), **reduction}
    if kind != "cpo" or r.random() < 0.5:
        tensors["chosen_lengths"] = lengths(r, S)
    if kind == "cpo":
        return Case(
            tensors,
            options | {"label_smoothing": maybe(r, r.uniform(0, 0.49), 0.0)},
            names[:2],
            k.cpo_loss,
            cpo_loss_ref,
        )
    tensors["rejected_lengths"] = lengths(r, S)
    if kind == "orpo":
        return Case(tensors, options, names[:2], k.orpo_loss, orpo_loss_ref)
    options |= {"gamma": r.uniform(-1, 3), "label_smoothing": maybe(r, r.uniform(0, 0.49), 0.0)}
    return Case(tensors, options, names[:2], k.simpo_loss, simpo_loss_ref)


def kto(r: Random, dtype: torch.dtype) -> Case:
    S = size(r, 50)
    tensors = {
        "policy_logps": logps(r, dtype, S),
        "reference_logps": logps(r, dtype, S),
        "desirable": truths(r, (S,), 0.5),
    }
    tensors["kl"] = floats(r, (), torch.float64 if dtype == torch.float64 else torch.float32).abs()
    options: dict[str, Any] = {
        "beta": log_uniform(r, 0.01, 3),
        "desirable_weight": r.uniform(0.1, 3),
        "undesirable_weight": r.uniform(0.1, 3),
    }
    options |= {
        "loss_type": r.choice(("kto", "apo_zero_unpaired")),
        "reduction": r.choice(("mean", "sum", "none")),
    }
    if options["loss_type"] != "kto":
        tensors.pop("kl")
        options["kl"] = None
    return Case(tensors, options, ("policy_logps",), k.kto_loss, kto_loss_ref)


def reward(r: Random, dtype: torch.dtype) -> Case:
    S = size(r, 50)
    tensors = {"chosen_scores": floats(r, (S,), dtype, 3), "rejected_scores": floats(r, (S,), dtype, 3)}
    if r.random() < 0.5:
        tensors["margin"] = floats(r, (S,), dtype)
    options = {"center_coefficient": maybe(r, r.random(), 0.0)}
    return Case(tensors, options, ("chosen_scores", "rejected_scores"), k.reward_loss, reward_loss_ref)


# Losses of policies.


def mask_of(r: Random, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    mask = truths(r, shape, r.choice((0.0, 0.5, 0.9, 1.0)))
    return r.choice((mask, mask, mask.long(), mask.float()))


def outside(r: Random, x: Tensor, mask: Tensor) -> Tensor:
    """Garbage outside the mask, which nobody may read."""
    return (
        torch.where(mask != 0, x, torch.tensor(r.choice((0.0, math.nan, math.inf, -1e4)), dtype=x.dtype))
        if r.random() < 0.5
        else x
    )


def policy_inputs(
    r: Random, dtype: torch.dtype, shape: tuple[int, ...], *, packed: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    mask = mask_of(r, shape, dtype)
    spread = r.choice((0.1, 0.5, 30))
    logp = -floats(r, shape, dtype, 2).abs()
    near = {
        name: (logp.double() + floats(r, shape, torch.float64, spread)).to(dtype)
        for name in ("old_logp", "reference_logp")
    }
    tensors = {"logp": logp, "old_logp": near["old_logp"], "advantages": floats(r, shape, dtype)}
    options: dict[str, Any] = {
        "clip": maybe(r, r.uniform(0.01, 0.9), None, 0.8),
        "clip_high": maybe(r, r.uniform(0.01, 2), None, 0.4),
    }
    options |= {"dual_clip": maybe(r, r.uniform(1.01, 5), None, 0.4), "aggregation": r.choice(AGGREGATIONS)}
    if r.random() < 0.5:
        tensors["entropy"] = floats(r, shape, dtype).abs()
        options["entropy_coefficient"] = maybe(r, r.uniform(-0.1, 0.1), 0.0)
    if r.random() < 0.5:
        tensors["reference_logp"] = near["reference_logp"]
        options |= {
            "kl_coefficient": maybe(r, r.uniform(0.01, 0.5), 0.0),
            "kl_estimator": r.choice(KL_ESTIMATORS),
        }
    tensors = {name: spoil(r, outside(r, x, mask), math.nan) for name, x in tensors.items()}
    tensors["mask"] = mask
    if options["aggregation"] != "sequence_mean" or r.random() < 0.3:
        options["normalizer"] = r.choice((None, r.uniform(0.5, 50), torch.tensor(r.randint(1, 90))))
    if packed:
        ends = sorted(r.randint(0, shape[0]) for _ in range(r.randint(0, 4)))
        tensors["cu_seqlens"] = torch.tensor([0, *ends, shape[0]])
    return tensors, options


def ppo(r: Random, dtype: torch.dtype) -> Case:
    packed = r.random() < 0.4
    shape = (size(r, 60),) if packed else (size(r, 7), size(r, 30))
    tensors, options = policy_inputs(r, dtype, shape, packed=packed)
    trained = ("logp", "entropy") if "entropy" in tensors else ("logp",)
    return Case(tensors, options, trained, k.ppo_loss, ppo_loss_ref)


def value(r: Random, dtype: torch.dtype) -> Case:
    shape = (size(r, 7), size(r, 30))
    mask = mask_of(r, shape, dtype)
    values = floats(r, shape, dtype)
    tensors = {
        "values": values,
        "old_values": (values.double() + floats(r, shape, torch.float64, 0.3)).to(dtype),
        "returns": floats(r, shape, dtype),
    }
    tensors = {name: spoil(r, outside(r, x, mask), math.nan) for name, x in tensors.items()} | {"mask": mask}
    options = {
        "clip": maybe(r, r.uniform(0.01, 1), None, 0.8),
        "normalizer": r.choice((None, r.uniform(0.5, 50))),
    }
    return Case(tensors, options, ("values",), k.value_loss, value_loss_ref)


def gae(r: Random, dtype: torch.dtype) -> Case:
    shape = (size(r, 7), size(r, 60))
    mask = mask_of(r, shape, dtype)
    tensors = {
        name: spoil(r, outside(r, floats(r, shape, dtype), mask), math.nan) for name in ("rewards", "values")
    } | {"mask": mask}
    if r.random() < 0.5:
        tensors["bootstrap"] = floats(r, shape[:1], dtype)
    options = {"gamma": r.choice((1.0, r.random())), "lam": r.choice((0.95, 1.0, 0.0, r.random()))}
    return Case(tensors, options, (), k.gae, gae_ref)


def whiten(r: Random, dtype: torch.dtype) -> Case:
    shape = (size(r, 7), size(r, 60))
    mask = mask_of(r, shape, dtype)
    tensors = {"x": outside(r, floats(r, shape, dtype, r.choice((1, 1, 1e-3, 100))), mask), "mask": mask}
    return Case(
        tensors,
        {"shift_mean": r.random() < 0.5, "eps": r.choice((1e-8, 1e-5))},
        (),
        k.masked_whiten,
        masked_whiten_ref,
    )


def sums(r: Random, dtype: torch.dtype) -> Case:
    N = size(r, 200)
    ends = sorted(r.randint(0, N) for _ in range(r.randint(0, 5)))
    bounds = torch.tensor([0, *ends, N])

    def specification(values: Tensor, *, mean: bool) -> Tensor:
        accumulator = torch.float64 if values.dtype == torch.float64 else torch.float32
        parts = values.to(accumulator).split(bounds.diff().tolist())
        return torch.stack([part.mean() if mean else part.sum() for part in parts])

    def ours(values: Tensor, *, mean: bool) -> Tensor:
        return k.sum_by_sequence(values, bounds, mean=mean)

    return Case(
        {"values": floats(r, (N,), dtype)}, {"mean": r.random() < 0.5}, ("values",), ours, specification
    )
