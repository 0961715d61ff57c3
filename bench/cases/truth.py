"""Whether a method's results are right: they are compared with plain PyTorch in fp64."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastalign.measure import Error, largest_error

from ..core.operation import EAGER, EXPONENTS, Check, Forward, Tensors, Verdict
from ..methods.table import OPERATIONS
from .case import DTYPES, Case

ROWS_AT_ONCE = 256  # rows of the truth in fp64


def make_inputs(case: Case, device: str) -> tuple[dict[str, Tensor], Tensor | None]:
    """The tensors of a case, and the upstream gradient of the first output.

    The upstream gradient is 1 for a loss, and of mixed sign for each token's log-probability.
    """
    tensors = OPERATIONS[case.operation].inputs(case.its_shape, DTYPES[case.dtype], device)
    for name in case.trained:
        tensors[name].requires_grad_()
    if not case.trained:
        return tensors, None
    if "logprobs" not in case.operation:
        return tensors, torch.ones((), device=device)
    generator = torch.Generator(device).manual_seed(1)
    # Rounded to the case's dtype, so that every method gets the same numbers.
    upstream = torch.randn(case.its_shape.N, generator=generator, device=device)
    return tensors, upstream.to(DTYPES[case.dtype])


def run(forward: Forward, tensors: Mapping[str, Tensor], upstream: Tensor | None) -> dict[str, Tensor]:
    """Outputs by name and, given an upstream gradient, each trained tensor's gradient as "d name"."""
    if upstream is None:
        with torch.no_grad():
            return forward(**tensors)
    outputs = forward(**tensors)
    first = next(iter(outputs.values()))
    trained = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    gradients = torch.autograd.grad(first, list(trained.values()), upstream.to(first.dtype))
    return {
        **{name: output.detach() for name, output in outputs.items()},
        **{f"d {name}": g for name, g in zip(trained, gradients)},
    }


def truth(case: Case, tensors: Mapping[str, Tensor], upstream: Tensor | None) -> dict[str, Tensor]:
    """Plain PyTorch in fp64, some rows at a time. Results of tokens are concatenated, sums are added up."""
    operation = OPERATIONS[case.operation]
    if operation.whole:
        return run(
            operation.whole(ROWS_AT_ONCE),
            {name: _widened(tensor) for name, tensor in tensors.items()},
            upstream,
        )
    forward = operation.methods[EAGER](next(iter(tensors.values())).device.type)
    shared = {name: _widened(tensor) for name, tensor in tensors.items() if name not in operation.rows}
    parts: dict[str, list[Tensor]] = {}
    for begin in range(0, case.its_shape.N, ROWS_AT_ONCE):
        rows = slice(begin, begin + ROWS_AT_ONCE)
        chunk = {
            name: shared[name] if name in shared else _widened(tensor[rows])
            for name, tensor in tensors.items()
        }
        share = min(ROWS_AT_ONCE, case.its_shape.N - begin) / case.its_shape.N  # of a mean over all tokens
        incoming = (
            None if upstream is None else upstream[rows] if upstream.dim() else upstream.double() * share
        )
        for name, result in run(forward, chunk, incoming).items():
            if result.dim() == 0:
                result = result * share
            if name in parts and (result.dim() == 0 or name.removeprefix("d ") in shared):
                parts[name][0] += result
            else:
                parts.setdefault(name, []).append(result)
    return {name: torch.cat(part) if len(part) > 1 else part[0] for name, part in parts.items()}


def _widened(tensor: Tensor) -> Tensor:
    return (
        tensor.detach().double().requires_grad_(tensor.requires_grad)
        if tensor.is_floating_point()
        else tensor
    )


def refusal(
    results: Mapping[str, Tensor],
    errors: Mapping[str, Error],
    eager: Mapping[str, Error],
    scales: Mapping[str, float],
) -> str:
    """Why the results are wrong, or "" if each error is at most twice PyTorch's error plus a floor.

    The floor is 4 eps(fp32) times the largest |truth|, which fp32 sums may cost any method. For a single
    number, which PyTorch may have right by luck, it is at least one rounding to the result's dtype.
    """
    for name, error in errors.items():
        eps = 4 * torch.finfo(torch.float32).eps
        if results[name].numel() == 1 and results[name].is_floating_point():
            eps = max(eps, torch.finfo(results[name].dtype).eps)
        limit = 2 * eager[name].absolute + eps * scales[name]
        if not error.absolute <= limit:  # NaN is wrong too
            return (
                f"wrong: {name} is off by {error.absolute:.2e}; "
                f"PyTorch by {eager[name].absolute:.2e}, {limit:.2e} allowed"
            )
    return ""


def checker(case: Case, tensors: dict[str, Tensor], upstream: Tensor | None) -> Check:
    """The judge of results: the operation's, or one that compares them with plain PyTorch's."""
    operation = OPERATIONS[case.operation]
    if operation.check:
        return operation.check(tensors)
    true = truth(case, tensors, upstream)
    scales = {key: value.double().abs().amax().item() for key, value in true.items()}
    exponent = scales.get(EXPONENTS, 0.0)
    scales = {key: scale * (1 + exponent) for key, scale in scales.items()}
    eager = largest_error(
        run(operation.methods[EAGER](next(iter(tensors.values())).device.type), tensors, upstream), true
    )

    def check(results: Tensors) -> Verdict:
        errors = largest_error(results, true)
        return Verdict(errors, refusal(results, errors, eager, scales))

    return check
