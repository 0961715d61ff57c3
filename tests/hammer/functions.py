"""Cases of the public functions: random shapes, dtypes, layouts, options and hostile values, each beside its
specification.

A case draws tensors and options, and is run three times: ours, the specification in the same dtype ("eager"),
and the specification in fp64 ("truth"). Outputs and gradients must be no worse than eager (tolerance.py); in
fp64 they must equal the truth to 1e-9.
"""

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastalign_kernels as k
from fastalign_kernels.linear.cross_entropy import linear_cross_entropy_ref
from fastalign_kernels.linear.token_stats import linear_token_stats_ref
from fastalign_kernels.logits import cross_entropy_ref, token_stats_ref
from fastalign_kernels.policy.arguments import AGGREGATIONS
from fastalign_kernels.policy.losses import KL_ESTIMATORS
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
from tests.tolerance import EPS, assert_no_worse_than_eager

Random = random.Random
DTYPES = (torch.float64, torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16)


class Case(NamedTuple):
    """A call: tensors by argument (those in `trained` get gradients), options, and what it is compared with.

    Functions that mean the same for ours and the specification take (tensors, options) and give a tensor, a
    tuple or a NamedTuple.
    """

    tensors: dict[str, Tensor]
    options: dict[str, Any]
    trained: tuple[str, ...]
    ours: Callable[..., Any]
    specification: Callable[..., Any]
    own: dict[str, Any] = {}  # noqa: RUF012 - options that only ours takes
    exact: bool = True  # whether gradients are those of the specification


def run(
    function: Callable[..., Any], case: Case, tensors: dict[str, Tensor], options: dict[str, Any], seed: int
) -> list[tuple[str, Tensor]]:
    """Named outputs of floating point, and the gradients for one random upstream gradient of all outputs that
    have a graph."""
    leaves = {name: x.detach().clone().requires_grad_(name in case.trained) for name, x in tensors.items()}
    result = function(**leaves, **options)
    fields = zip(result._fields, result) if hasattr(result, "_fields") else [("result", result)]
    outputs = [(name, x) for name, x in fields if isinstance(x, Tensor)]
    generator = torch.Generator().manual_seed(seed)
    total: Any = 0
    for _, x in outputs:
        if x.requires_grad:
            upstream = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            total = total + (x.double() * upstream).sum()
    found = [(name, x.detach()) for name, x in outputs]
    if isinstance(total, Tensor):
        wanted = [leaves[name] for name in case.trained]
        grads = torch.autograd.grad(total, wanted, allow_unused=True)
        found += [
            (f"d {name}", g if g is not None else torch.zeros_like(x))
            for name, x, g in zip(case.trained, wanted, grads)
        ]
    return found


def check(case: Case, seed: int) -> None:
    """Raise AssertionError where ours is worse than it may be."""
    wide = {name: x.double() if x.is_floating_point() else x for name, x in case.tensors.items()}
    options_wide = {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in case.options.items()
    }
    truth = run(case.specification, case, wide, options_wide, seed)
    eager = run(case.specification, case, case.tensors, case.options, seed)
    ours = run(case.ours, case, case.tensors, {**case.options, **case.own}, seed)
    assert [name for name, _ in ours] == [name for name, _ in truth], (ours, truth)
    in_fp64 = all(x.dtype == torch.float64 for x in case.tensors.values() if x.is_floating_point())
    loud = any(not true.isfinite().all() for name, true in truth if not name.startswith("d "))
    for (name, own), (_, plain), (_, true) in zip(ours, eager, truth):
        gradient = name.startswith("d ")
        if not own.is_floating_point() or (gradient and not case.exact):
            continue  # top1 turns on ties of rounded logits
        # Where low precision overflows in the specification too, nothing can be said; nor of gradients that
        # go with a NaN that is seen.
        keep = (plain.isfinite() == true.isfinite()) & (plain.isnan() == true.isnan())
        keep &= own.isfinite() | true.isfinite()  # inf may be NaN
        if gradient and loud:
            keep &= true.isfinite() & own.isfinite()
        if gradient and own.dtype == torch.float16:  # whose small numbers have few digits
            keep &= (true.abs() >= torch.finfo(torch.float16).smallest_normal) | (true == 0)
        assert_close(own[keep], plain[keep], true[keep], name, in_fp64=in_fp64)


def assert_close(own: Tensor, plain: Tensor, true: Tensor, name: str, *, in_fp64: bool) -> None:
    if not own.numel():
        return
    if in_fp64:
        finite = true[true.isfinite()]
        largest = finite.abs().max().item() if finite.numel() else 1.0
        torch.testing.assert_close(
            own,
            true,
            rtol=1e-9,
            atol=1e-9 * largest + 1e-14,
            equal_nan=True,
            msg=lambda text: f"{name}: {text}",
        )
        return
    low = own.dtype in (torch.bfloat16, torch.float16)
    if low:  # few numbers of few digits: eager is lucky more often
        plain = true + 2 * (plain - true)
    near = (
        4 * EPS if not true.any() else 1e-14
    )  # what terms that cancel leave; the specifications have 1 - sigmoid(40) = 0
    far = ~((own - true).abs() <= near)
    if far.any():
        rounding = torch.finfo(own.dtype).eps if low else EPS
        assert_no_worse_than_eager(
            own[far], plain[far].to(own.dtype), true[far].double(), name, rounding=rounding, terms=16
        )


# Draws.


def maybe(r: Random, value: Any, otherwise: Any = None, chance: float = 0.5) -> Any:
    return value if r.random() < chance else otherwise


def log_uniform(r: Random, low: float, high: float) -> float:
    return math.exp(r.uniform(math.log(low), math.log(high)))


def size(r: Random, most: int) -> int:
    """Small sizes often, 1 among them; powers of two and their neighbours too."""
    if r.random() < 0.3:
        return min(most, max(1, 2 ** r.randrange(0, 9) + r.choice((-1, 0, 1))))
    return max(1, round(log_uniform(r, 1, most)))


def floats(r: Random, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(r.getrandbits(40))
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    if r.random() < 0.1:
        x = (x * 2).round() / 2  # ties
    return strided(r, x.to(dtype))


def whole(r: Random, high: int, shape: tuple[int, ...], low: int = 0) -> Tensor:
    x = torch.randint(low, high, shape, generator=torch.Generator().manual_seed(r.getrandbits(40)))
    return strided(r, x.to(r.choice((torch.int64, torch.int64, torch.int32))))


def truths(r: Random, shape: tuple[int, ...], share: float) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(r.getrandbits(40))) < share


def strided(r: Random, x: Tensor) -> Tensor:
    """The same values, sometimes in another layout."""
    kind = r.randrange(6)
    if kind == 0 and x.dim():
        return torch.stack([x, x], -1).flatten(-2)[..., ::2]
    if kind == 1 and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return x


def spoil(r: Random, x: Tensor, *values: float) -> Tensor:
    """One element replaced, rarely."""
    if values and x.numel() and r.random() < 0.06:
        x = x.clone()
        x[tuple(r.randrange(length) for length in x.shape)] = r.choice(values)
    return x


def lead(r: Random, most: int = 40) -> tuple[int, ...]:
    return r.choice([(size(r, most),), (size(r, 6), size(r, 8))])


# The head, from logits and from hidden states.


def transforms(r: Random, *, scaled: bool) -> dict[str, Any]:
    options: dict[str, Any] = {
        "temperature": maybe(r, log_uniform(r, 0.1, 5), 1.0),
        "softcap": maybe(r, log_uniform(r, 1, 60), None, 0.3),
    }
    if scaled:
        options["logit_scale"] = maybe(r, r.choice((-1, 1, 1)) * log_uniform(r, 0.05, 3), 1.0)
    return options


def ids_of(r: Random, V: int, shape: tuple[int, ...], options: dict[str, Any]) -> Tensor:
    """Ids, some ignored; ignore_index goes into the options, and may itself be an id."""
    ignore = r.choice((-100, -100, -1, r.randrange(V), None, 2**40))
    options["ignore_index"] = ignore
    ids = whole(r, V, shape)
    share = r.choice((0.0, 0.0, 0.3, 0.9, 1.0))
    value = -100 if ignore is None else ignore
    if value > 2**31 - 1:
        ids = ids.long()
    return torch.where(truths(r, shape, share), torch.tensor(value, dtype=ids.dtype), ids)


def loss_of_tokens(
    r: Random, shape: tuple[int, ...], dtype: torch.dtype, tensors: dict[str, Tensor]
) -> dict[str, Any]:
    options: dict[str, Any] = {
        "label_smoothing": maybe(r, r.random(), 0.0, 0.3),
        "z_loss": maybe(r, log_uniform(r, 1e-4, 1e-1), 0.0, 0.3),
    }
    options["reduction"] = r.choice(("mean", "sum", "none"))
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    if r.random() < 0.3:
        tensors["token_weights"] = floats(r, shape, accumulator).abs() + 0.1
    if options["reduction"] == "mean" and r.random() < 0.3:
        options["num_items"] = r.choice((log_uniform(r, 0.5, 100), torch.tensor(r.randint(1, 50))))
    return options


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
        ids = given["targets"] if "targets" in given else given["ids"]
        ignored = ids.long() == (-100 if given["ignore_index"] is None else given["ignore_index"])
        if "mask" in given:
            ignored = ignored | (given["mask"] == 0)
        return specification(**{**given, name: torch.where(ignored[..., None], 0.0, given[name])})

    return read


class Head(NamedTuple):
    """Inputs of a head function; `own`: options that the specification has not."""

    tensors: dict[str, Tensor]
    options: dict[str, Any]
    trained: tuple[str, ...]
    own: dict[str, Any]


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
    tensors, options, trained, own = head(r, dtype, shape)
    tensors["targets"] = tensors.pop("ids")
    options |= loss_of_tokens(r, shape, dtype, tensors)
    if r.random() < 0.2 and not (options["label_smoothing"] and options["softcap"]):
        own["tail_eps"] = log_uniform(r, 1e-6, 0.2)
    if "token_weights" in tensors and "tail_eps" not in own and r.random() < 0.5:
        trained = (*trained, "token_weights")
    return Case(
        tensors,
        options,
        trained,
        k.linear_cross_entropy,
        reading(linear_cross_entropy_ref, "hidden"),
        own,
        exact="tail_eps" not in own,
    )


def linear_token_stats(r: Random, dtype: torch.dtype) -> Case:
    tensors, options, trained, own = head(r, dtype, lead(r))
    if r.random() < 0.5:
        return Case(
            tensors,
            options,
            trained,
            k.linear_logprobs,
            reading(lambda **given: linear_token_stats_ref(**given).logp, "hidden"),
            own,
        )
    return Case(
        tensors, options, trained, k.linear_token_stats, reading(linear_token_stats_ref, "hidden"), own
    )


HEAD_OPTIONS = ("temperature", "softcap", "logit_scale", "ignore_index")


def apart(given: dict[str, Any], *names: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of those names, and the others."""
    return {n: given[n] for n in names if n in given}, {n: x for n, x in given.items() if n not in names}


def linear_ppo(r: Random, dtype: torch.dtype) -> Case:
    shape = (size(r, 5), size(r, 9))
    tensors, options, trained, own = head(r, dtype, shape)
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
        own,
    )


def sequence_logps(given: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    of_head, others = apart(given, "hidden", "weight", "ids", "bias", *HEAD_OPTIONS)
    value = -100 if given["ignore_index"] is None else given["ignore_index"]
    return linear_token_stats_ref(**of_head).logp.sum(-1), (given["ids"].long() != value).sum(-1), others


def linear_dpo(r: Random, dtype: torch.dtype) -> Case:
    S = size(r, 4)
    tensors, options, trained, own = head(r, dtype, (2 * S, size(r, 8)))
    tensors["reference_logps"] = floats(
        r, (2 * S,), torch.float64 if dtype == torch.float64 else torch.float32
    )
    options |= pair_options(r)

    def specification(**given: Any) -> Any:
        logps, lengths, others = sequence_logps(given)
        reference = others.pop("reference_logps")
        if PAIR_LOSSES[given["loss_type"]].lengths == "needed":
            others |= {"chosen_lengths": lengths[:S], "rejected_lengths": lengths[S:]}
        loss = dpo_loss_ref(logps[:S], logps[S:], reference[:S], reference[S:], **others)
        return k.LinearPreferenceLoss(*loss, logps[:S].detach(), logps[S:].detach())

    return Case(tensors, options, trained, k.linear_dpo_loss, reading(specification, "hidden"), own)


def linear_kto(r: Random, dtype: torch.dtype) -> Case:
    S = size(r, 6)
    tensors, options, trained, own = head(r, dtype, (S, size(r, 8)))
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
        logps, _, others = sequence_logps(given)
        return k.LinearUnpairedLoss(*kto_loss_ref(logps, **others), logps.detach())

    return Case(tensors, options, trained, k.linear_kto_loss, reading(specification, "hidden"), own)


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


CASES: dict[str, Callable[[Random, torch.dtype], Case]] = {
    function.__name__: function
    for function in (
        *(
            cross_entropy,
            token_stats,
            linear_cross_entropy,
            linear_token_stats,
            linear_ppo,
            linear_dpo,
            linear_kto,
        ),
        *(pairs, kto, reward, ppo, value, gae, whiten, sums),
    )
}


def fuzz(r: Random) -> str:
    """One case; its name."""
    name = r.choice(list(CASES))
    dtype = r.choice(DTYPES)
    torch.set_num_threads(r.choice((1, 1, 2)))
    check(CASES[name](r, dtype), r.getrandbits(40))
    return f"{name}, {str(dtype).removeprefix('torch.')}"
