"""On a CPU, results and gradients have the same bits with any number of threads; docs/determinism.md says
where they do not."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign_kernels import linear_cross_entropy, linear_logprobs, native, tail_report
from fastalign_kernels.ordered_sum import GRAIN, ordered_sum
from tests.kernels.public_calls import FUNCTIONS, call_of, tensors_of

pytestmark = [
    pytest.mark.usefixtures("forced_gemm"),
    pytest.mark.skipif(
        bool(native.missing), reason="without the native library PyTorch's ops serve, and they differ"
    ),
]
OURS = pytest.mark.skipif(
    not native.has_gemm(), reason="without AVX-512 products are torch's, and theirs differ"
)
# Enough for threads to share: columns of the vocabulary beyond 32768, k of a product, tokens beyond 32768,
# one token alone.
SIZES = [
    {"rows": 2, "length": 5, "hidden_size": 9, "vocab_size": 33001},
    {"rows": 8, "length": 40, "hidden_size": 24, "vocab_size": 1337},
    {"rows": 300, "length": 111, "hidden_size": 2, "vocab_size": 3},
    {"rows": 1, "length": 1, "hidden_size": 24, "vocab_size": 1337},
]
CONSTANT = {"x", "rewards", "bootstrap", "num_items", "normalizer"}  # what nobody asks a gradient of


def outcome(function: Any, arguments: dict[str, Any], threads: int) -> list[Tensor]:
    """Results and gradients, for an upstream gradient that is the same in each call."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        copies = {
            name: value.clone() if isinstance(value, Tensor) else value for name, value in arguments.items()
        }
        leaves = [
            copies[name].requires_grad_()
            for name, value in copies.items()
            if isinstance(value, Tensor) and value.is_floating_point() and name not in CONSTANT
        ]
        results = [torch.as_tensor(result) for result in tensors_of(function(**copies)) if result is not None]
        differentiable = [result for result in results if result.requires_grad]
        generator = torch.Generator().manual_seed(1)
        upstream = [
            torch.randn(result.shape, generator=generator).to(result.dtype) for result in differentiable
        ]
        grads = (
            torch.autograd.grad(differentiable, leaves, upstream, allow_unused=True) if differentiable else ()
        )
        return [result.detach() for result in results] + [grad for grad in grads if grad is not None]
    finally:
        torch.set_num_threads(before)


def bits(values: Tensor) -> tuple[torch.Size, torch.dtype, bytes]:
    """All of a tensor: NaN, -0 and 0 are different."""
    flat = values.contiguous().view(-1)
    return values.shape, values.dtype, flat.view(torch.uint8).numpy().tobytes()


def assert_same_with_any_threads(function: Any, arguments: dict[str, Any]) -> None:
    alone = outcome(function, arguments, 1)
    for threads in (2, 3):
        for place, (expected, found) in enumerate(
            zip(alone, outcome(function, arguments, threads), strict=True)
        ):
            assert bits(expected) == bits(found), f"{threads} threads, result or gradient {place}"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=OURS) if name.startswith(("linear_", "tail_")) else name
        for name in FUNCTIONS
        if name != "plan_head"  # it computes nothing
    ],
)
def test_every_public_function_gives_the_same_bits_with_any_number_of_threads(name: str) -> None:
    # One token's products are torch's (gemm.mm), whose bits depend on the threads on an Intel CPU: an H200's.
    torch_takes_one_token = (
        name.startswith(("linear_", "tail_")) and not torch.ops.fastalign.cpu_prefers_native_gemm()
    )
    for sizes in SIZES[:-1] if torch_takes_one_token else SIZES:
        assert_same_with_any_threads(FUNCTIONS[name], call_of(name, **sizes))


@OURS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dropped_columns_and_low_precision_change_nothing_about_it(dtype: torch.dtype) -> None:
    call = call_of("linear_cross_entropy", rows=1, length=300, hidden_size=8, vocab_size=33001)
    arguments = {
        name: value.to(dtype) if name in ("hidden", "weight", "bias") else value
        for name, value in call.items()
    }
    arguments |= {"weight": 3 * arguments["weight"], "tail_eps": 1e-3}
    assert (
        tail_report(
            **{name: arguments[name] for name in ("hidden", "weight", "bias", "targets", "tail_eps")}
        ).kept_share
        < 0.6
    )
    assert_same_with_any_threads(linear_cross_entropy, arguments)


@OURS
def test_a_frozen_head_gives_the_same_bits_with_any_number_of_threads() -> None:
    def frozen(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        return linear_logprobs(hidden, weight.detach(), ids)

    arguments = call_of("linear_logprobs", rows=8, length=40, hidden_size=24, vocab_size=1337)
    assert_same_with_any_threads(frozen, {name: arguments[name] for name in ("hidden", "weight", "ids")})


@pytest.mark.parametrize("elements", [0, 1, GRAIN - 1, GRAIN, 5 * GRAIN + 77])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ordered_sum_is_a_sum(elements: int, dtype: torch.dtype) -> None:
    x = torch.randn(elements, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()
    total = ordered_sum(x)
    assert total.dtype == dtype and total.shape == ()
    rtol, atol = (1e-5, 1e-3) if dtype == torch.float32 else (1e-12, 1e-9)
    torch.testing.assert_close(total.double(), x.double().sum(), rtol=rtol, atol=atol)
    assert torch.autograd.grad(total, x)[0].eq(1).all()
