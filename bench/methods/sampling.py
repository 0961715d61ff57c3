"""Drawing a token from each row of logits [N, V]: inputs, filters, methods, and the judge of drawn tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.measure import Error, largest_error
from fastalign_kernels.sampling import Sample, sample

from ..core import smollm2
from ..core.operation import OURS, Check, Forward, Operation, Shape, Tensors, Verdict, here, module, needs_gpu

NATS = 1e-5  # allowed error of a log-probability, of the log of the kept mass and of the entropy
# The share of a row's mass by which top-p may miss its threshold: prefix sums of V probabilities in fp32 cost
# it.
EDGE = 1e-5
MULTINOMIAL = "softmax, torch.multinomial"
TRANSFORMERS = "transformers' warpers, softmax, torch.multinomial"


class Filter(NamedTuple):
    """Filters, applied as in transformers: temperature, then top_k (0: all), then top_p of the rest."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def random_inputs(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Normal logits with standard deviation 2: a flat softmax, the hard case, where top-p 0.9 keeps tens of
    thousands of ids."""
    generator = torch.Generator(device).manual_seed(0)
    return {"logits": torch.randn(shape.N, shape.V, generator=generator, device=device).mul_(2).to(dtype)}


def trained_inputs(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Logits after Zipf-Mandelbrot's law: rank r has -s log(r + 2), with s from 1.2 to 2.2 over the rows.

    Ids are in random order. The law is fitted to SmolLM2-135M on bench/README.md. Entropy: 4.0 nats a row on
    average (the model: 3.9). Average log-probability at the ranks 1, 10, 100, 1000, 10000: -1.7, -4.0, -7.7,
    -11.5, -15.5 (the model: -1.5, -4.6, -7.7, -10.8, -15.1).
    """
    generator = torch.Generator(device).manual_seed(0)
    exponents = torch.linspace(1.2, 2.2, shape.N, device=device)[:, None]
    by_rank = -exponents * torch.arange(3, shape.V + 3, device=device).log()
    permutations = (torch.randperm(shape.V, generator=generator, device=device) for _ in range(shape.N))
    return {"logits": by_rank.gather(-1, torch.stack(list(permutations))).to(dtype)}


def _ours(rule: Filter) -> Callable[[str], Forward]:
    fields = Sample._fields[:-1]  # kept_ids was not asked for
    return here(lambda logits: dict(zip(fields, sample(logits, seed=0, **rule._asdict())[:-1])))


def multinomial(device: str) -> Forward:
    # Seeded, so that a draw at the edge of the kept set happens in every run or in none.
    generator = torch.Generator(device).manual_seed(0)
    return lambda logits: {"token": torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]}


def warpers(rule: Filter) -> Callable[[str], Forward]:
    """A function that draws as transformers' `generate` does, less its copy of the logits."""

    def load(device: str) -> Forward:
        process = module("transformers.generation.logits_process", "transformers")
        processors = process.LogitsProcessorList()
        if rule.temperature != 1:
            processors.append(process.TemperatureLogitsWarper(rule.temperature))
        if rule.top_k:
            processors.append(process.TopKLogitsWarper(rule.top_k))
        if rule.top_p < 1:
            processors.append(process.TopPLogitsWarper(rule.top_p))
        draw = multinomial(device)
        return lambda logits: draw(logits=processors(None, logits))

    return load


def flashinfer(rule: Filter) -> Callable[[str], Forward]:
    def load(device: str) -> Forward:
        needs_gpu(device, "CUDA")
        sampling = module("flashinfer.sampling", "flashinfer-python")
        if rule == Filter():
            return lambda logits: {"token": sampling.sampling_from_logits(logits)}
        draw, limit = (
            (sampling.top_k_sampling_from_probs, rule.top_k)
            if rule.top_k
            else (sampling.top_p_sampling_from_probs, rule.top_p)
        )
        return lambda logits: {"token": draw(sampling.softmax(logits, rule.temperature), limit)}

    return load


def drawn_from(rule: Filter) -> Callable[[Tensors], Check]:
    """The judge of a draw, in fp64: the filter keeps each token, and the numbers reported with it are right.

    The error of "token" is how many tokens lie outside the kept set, and their share of the rows.
    """

    def make(tensors: Tensors) -> Check:
        raw = tensors["logits"].double().log_softmax(-1)
        N, V = raw.shape
        logp = (raw / rule.temperature).log_softmax(-1)
        ranked = logp.sort(-1, descending=True).values
        mass = ranked.exp()
        if rule.top_k:
            mass *= ranked >= ranked[:, rule.top_k - 1, None]
        above = (mass.cumsum(-1) - mass) / mass.sum(-1, keepdim=True)

        def least_kept(top_p: float) -> Tensor:
            within = ((above < top_p) & (mass > 0)).sum(-1, keepdim=True)
            return ranked.gather(-1, within - 1)

        top_p = rule.top_p if rule.top_p < 1 else math.inf
        edge = least_kept(top_p + EDGE)
        kept = logp >= least_kept(top_p)
        # Exactly 0 if all ids are kept: rounding noise would have a relative error of 1
        log_kept = logp.where(kept, -math.inf).logsumexp(-1).where(~kept.all(-1), 0)
        entropy = -(raw.exp() * raw).sum(-1)

        def check(results: Tensors) -> Verdict:
            token = results["token"].long()
            at = token.clamp(0, V - 1)[:, None]
            outside = int(((token != at[:, 0]) | (logp.gather(-1, at) < edge)[:, 0]).sum())
            true = {
                "logp": logp.gather(-1, at)[:, 0] - log_kept,
                "log_kept": log_kept,
                "logp_raw": raw.gather(-1, at)[:, 0],
                "entropy": entropy,
            }
            numbers = largest_error({name: results[name] for name in true if name in results}, true)
            errors = {"token": Error(outside, outside / N), **numbers}
            if outside:
                return Verdict(errors, f"wrong: {outside} of {N} tokens drawn outside the kept set")
            for name, error in numbers.items():
                if not error.absolute <= NATS:  # NaN is wrong too
                    return Verdict(
                        errors, f"wrong: {name} is off by {error.absolute:.2e} nats, {NATS:.0e} allowed"
                    )
            return Verdict(errors, "")

        return check

    return make


def _sampling(
    rule: Filter, inputs: Callable[[Shape, torch.dtype, str], dict[str, Tensor]] = random_inputs
) -> Operation:
    """Our sampler and its peers under a filter; without one, transformers is softmax and multinomial."""
    peer = {MULTINOMIAL: multinomial} if rule == Filter() else {TRANSFORMERS: warpers(rule)}
    return Operation(
        inputs, {OURS: _ours(rule), **peer, "FlashInfer": flashinfer(rule)}, ("logits",), drawn_from(rule)
    )


NUCLEUS = Filter(temperature=0.7, top_p=0.9)
SAMPLING = {
    "sample": _sampling(Filter()),
    "sample, top_k 50": _sampling(Filter(top_k=50)),
    "sample, top_p 0.9 at T 0.7": _sampling(NUCLEUS),
    "sample, top_p 0.9 at T 0.7, trained-like logits": _sampling(NUCLEUS, trained_inputs),
    "sample, top_p 0.9 at T 0.7, SmolLM2's logits": _sampling(NUCLEUS, smollm2.logits_inputs),
}
