"""Cases of the functions of logits and of the head."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastalign_kernels as k
from fastalign_kernels.linear.outcomes import DIVERGENCES
from fastalign_kernels.linear.reference import (
    linear_cross_entropy_ref,
    linear_distillation_loss_ref,
    linear_kept_stats_ref,
    linear_token_stats_ref,
)
from fastalign_kernels.logits import cross_entropy_ref, token_stats_ref
from fastalign_kernels.policy.reference import ppo_loss_ref
from fastalign_kernels.preference.formulas import PAIR_LOSSES
from fastalign_kernels.preference.reference import (
    dpo_loss_ref,
    kto_loss_ref,
)
from tests.hammer.case import (
    Case,
    Random,
    floats,
    ids_of,
    lead,
    log_uniform,
    loss_of_tokens,
    maybe,
    size,
    spoil,
    transforms,
    truths,
)
from tests.hammer.loss_cases import pair_options, policy_inputs


def logits_case(r: Random, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any], tuple[int, ...]]:
    shape, V = lead(r), max(size(r, 700), 1 if dtype == torch.float64 else 2)
    options = transforms(r, scaled=False)
    logits = floats(r, (*shape, V), dtype, r.choice((0.01, 1, 1, 5, 300)))
    logits = spoil(r, logits, -math.inf, math.nan, 6e4)
    return {"logits": logits, "ids": ids_of(r, V, shape, options)}, options, shape


def cross_entropy(r: Random, dtype: torch.dtype) -> Case:
    tensors, options, shape = logits_case(r, dtype)
    tensors["targets"] = tensors.pop("ids")
    options |= loss_of_tokens(r, shape, dtype, tensors)
    return Case(tensors, options, ("logits",), k.cross_entropy, reading(cross_entropy_ref, "logits"))


def token_stats(r: Random, dtype: torch.dtype) -> Case:
    tensors, options, _ = logits_case(r, dtype)
    if r.random() < 0.5:
        return Case(
            tensors,
            options,
            ("logits",),
            k.token_logprobs,
            reading(lambda **given: token_stats_ref(**given).logp, "logits"),
        )
    return Case(tensors, options, ("logits",), k.token_stats, reading(token_stats_ref, "logits"))


def reading(specification: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The specification where rows of `name` (hidden or logits) that are ignored or outside the mask are not
    read."""

    def read(**given: Any) -> Any:
        ids = next(given[name] for name in ("targets", "ids", "teacher_ids") if name in given)
        ignored = ids.long() == (-100 if given["ignore_index"] is None else given["ignore_index"])
        if "teacher_ids" in given:
            ignored = ignored.all(-1)
        if "mask" in given:
            ignored = ignored | (given["mask"] == 0)
        return specification(**{**given, name: torch.where(ignored[..., None], 0.0, given[name])})

    return read


class Head(NamedTuple):
    """Inputs of a head function; `ours_only`: options that the specification has not."""

    tensors: dict[str, Tensor]
    options: dict[str, Any]
    trained: tuple[str, ...]
    ours_only: dict[str, Any]


def head(r: Random, dtype: torch.dtype, shape: tuple[int, ...]) -> Head:
    H, V = (
        size(r, 70),
        max(size(r, 500), 1 if dtype == torch.float64 else 2),
    )  # with one id the loss is 0, and rounding is all there is
    options = transforms(r, scaled=True)
    spread = r.choice((0.1, 1, 1, 3)) / H**0.5
    tensors = {"hidden": floats(r, (*shape, H), dtype), "weight": floats(r, (V, H), dtype, spread)}
    tensors["ids"] = ids_of(r, V, shape, options)
    trained = r.choice((("hidden", "weight"), ("hidden",), ("weight",)))
    if r.random() < 0.4:
        tensors["bias"] = floats(r, (V,), dtype)
        trained = (*trained, "bias") if "weight" in trained else trained
    tensors["hidden"] = spoil(r, tensors["hidden"], math.nan, math.inf)
    return Head(
        tensors,
        options,
        trained,
        {"workspace_mib": maybe(r, log_uniform(r, 1, 60) * 8 * V / 2**20, None, 0.7)},
    )


def linear_cross_entropy(r: Random, dtype: torch.dtype) -> Case:
    shape = lead(r)
    tensors, options, trained, ours_only = head(r, dtype, shape)
    tensors["targets"] = tensors.pop("ids")
    options |= loss_of_tokens(r, shape, dtype, tensors)
    if r.random() < 0.2 and not (options["label_smoothing"] and options["softcap"]):
        ours_only["tail_eps"] = log_uniform(r, 1e-6, 0.2)
    if "token_weights" in tensors and "tail_eps" not in ours_only and r.random() < 0.5:
        trained = (*trained, "token_weights")
    return Case(
        tensors,
        options,
        trained,
        k.linear_cross_entropy,
        reading(linear_cross_entropy_ref, "hidden"),
        ours_only,
        exact="tail_eps" not in ours_only,
    )


def linear_distillation(r: Random, dtype: torch.dtype) -> Case:
    shape = lead(r)
    tensors, options, trained, ours_only = head(r, dtype, shape)
    ids, V = tensors.pop("ids"), tensors["weight"].shape[0]
    K = min(V, size(r, 20))
    logits = floats(r, (*shape, V), torch.float64, r.choice((0.1, 3, 30)))
    logp, teacher_ids = logits.log_softmax(-1).topk(K)
    value = -100 if options["ignore_index"] is None else options["ignore_index"]
    ignored = (ids.long() == value)[..., None]
    tensors |= {"teacher_ids": teacher_ids.masked_fill(ignored, value), "teacher_logp": logp}
    options |= loss_of_tokens(r, shape, dtype, tensors)
    for name in ("label_smoothing", "z_loss"):
        options.pop(name)
    options["divergence"] = r.choice(list(DIVERGENCES))
    return Case(
        tensors,
        options,
        trained,
        k.linear_distillation_loss,
        reading(linear_distillation_loss_ref, "hidden"),
        ours_only,
    )


def kept_sets(r: Random, ids: Tensor, V: int) -> tuple[Tensor, Tensor]:
    """Sets of one to all ids; most have their token's id, some are empty."""
    share = r.choice((0.02, 0.3, 1.0))
    kept = truths(r, (ids.numel(), V), share)
    inside = (ids.reshape(-1) >= 0) & (ids.reshape(-1) < V) & truths(r, (ids.numel(),), 0.9)
    kept[inside, ids.reshape(-1)[inside].long()] = True
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)])
    return offsets, kept.nonzero()[:, 1]


def linear_token_stats(r: Random, dtype: torch.dtype) -> Case:
    tensors, options, trained, ours_only = head(r, dtype, lead(r))
    if r.random() < 0.5:
        specification: Callable[..., Any] = lambda **given: linear_token_stats_ref(**given).logp  # noqa: E731
        if r.random() < 0.4:
            options["kept"] = kept_sets(r, tensors["ids"], tensors["weight"].shape[0])
            specification = lambda **given: linear_kept_stats_ref(**given)[0]  # noqa: E731
        return Case(tensors, options, trained, k.linear_logprobs, reading(specification, "hidden"), ours_only)
    return Case(
        tensors, options, trained, k.linear_token_stats, reading(linear_token_stats_ref, "hidden"), ours_only
    )


HEAD_OPTIONS = ("temperature", "softcap", "logit_scale", "ignore_index")


def apart(given: dict[str, Any], *names: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of those names, and the others."""
    return {n: given[n] for n in names if n in given}, {n: x for n, x in given.items() if n not in names}


def linear_ppo(r: Random, dtype: torch.dtype) -> Case:
    shape = (size(r, 5), size(r, 9))
    tensors, options, trained, ours_only = head(r, dtype, shape)
    policy, policy_options = policy_inputs(r, dtype, shape, packed=False)
    policy.pop("logp")
    entropy = policy.pop("entropy", None) is not None
    policy_options["entropy_coefficient"] = policy_options.get("entropy_coefficient", 0.0) if entropy else 0.0

    def specification(**given: Any) -> Any:
        of_head, of_loss = apart(given, "hidden", "weight", "ids", "bias", *HEAD_OPTIONS)
        stats = linear_token_stats_ref(**of_head)
        value = -100 if given["ignore_index"] is None else given["ignore_index"]
        of_loss["mask"] = (of_loss["mask"] != 0) & (given["ids"].long() != value)
        return ppo_loss_ref(stats.logp, entropy=stats.entropy, **of_loss)

    return Case(
        {**tensors, **policy},
        {**options, **policy_options},
        trained,
        k.linear_ppo_loss,
        reading(specification, "hidden"),
        ours_only,
    )


def sequence_logps(given: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    of_head, rest = apart(given, "hidden", "weight", "ids", "bias", *HEAD_OPTIONS)
    value = -100 if given["ignore_index"] is None else given["ignore_index"]
    return linear_token_stats_ref(**of_head).logp.sum(-1), (given["ids"].long() != value).sum(-1), rest


def linear_dpo(r: Random, dtype: torch.dtype) -> Case:
    S = size(r, 4)
    tensors, options, trained, ours_only = head(r, dtype, (2 * S, size(r, 8)))
    tensors["reference_logps"] = floats(
        r, (2 * S,), torch.float64 if dtype == torch.float64 else torch.float32
    )
    options |= pair_options(r)

    def specification(**given: Any) -> Any:
        logps, lengths, rest = sequence_logps(given)
        reference = rest.pop("reference_logps")
        if PAIR_LOSSES[given["loss_type"]].lengths == "needed":
            rest |= {"chosen_lengths": lengths[:S], "rejected_lengths": lengths[S:]}
        loss = dpo_loss_ref(logps[:S], logps[S:], reference[:S], reference[S:], **rest)
        return k.LinearPreferenceLoss(*loss, logps[:S].detach(), logps[S:].detach())

    return Case(tensors, options, trained, k.linear_dpo_loss, reading(specification, "hidden"), ours_only)


def linear_kto(r: Random, dtype: torch.dtype) -> Case:
    S = size(r, 6)
    tensors, options, trained, ours_only = head(r, dtype, (S, size(r, 8)))
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    tensors |= {
        "reference_logps": floats(r, (S,), accumulator),
        "desirable": truths(r, (S,), 0.5),
        "kl": floats(r, (), accumulator).abs(),
    }
    options |= {
        "beta": log_uniform(r, 0.01, 2),
        "desirable_weight": r.uniform(0.1, 2),
        "undesirable_weight": r.uniform(0.1, 2),
    }

    def specification(**given: Any) -> Any:
        logps, _, rest = sequence_logps(given)
        return k.LinearUnpairedLoss(*kto_loss_ref(logps, **rest), logps.detach())

    return Case(tensors, options, trained, k.linear_kto_loss, reading(specification, "hidden"), ours_only)
