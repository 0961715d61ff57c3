"""The ops of the policy losses: one pass over tokens gives sums, and the gradients of the inputs.

The backward pass scales these gradients by the upstream gradient, so a second derivative is an error. Sums
are taken over fixed blocks and added in fp64, so they do not depend on the number of threads. Bytes: 3 to 5 N
e and N read, N e or 2 N e written. A kernel also gives the loss and the metrics: computed from the sums by
torch, they would take ten small operations, of 1 us each on a CPU and 5 us on a GPU.

A CPU runs csrc/policy/losses.h, a GPU losses_triton.py. The functions of this file run where the native
library is missing, and for fp64 on a GPU.
"""

from __future__ import annotations

from enum import IntEnum
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from ..autograd import register_row_loss
from ..dispatch import Kernels, accumulator_of, widest
from ..namespace import ops
from .weights import TokenWeights, Weighting

KL_ESTIMATORS = ("k1", "k2", "k3")
LARGEST_EXPONENT = 20.0


class PolicySum(IntEnum):
    """Sums over the mask that policy_tokens writes, [8] fp64.

    csrc/policy and policy/losses_triton.py write them in this order.
    """

    LOSS = 0  # times the weight
    POLICY = 1
    ENTROPY = 2
    KL = 3
    RATIO = 4
    CLIPPED = 5
    SQUARES = 6  # d^2 / 2
    TOKENS = 7


class ValueSum(IntEnum):
    """Sums over the mask that value_tokens takes, in fp64."""

    LOSS = 0  # times the weight
    CLIPPED = 1
    RETURN = 2
    RETURN_SQUARE = 3
    ERROR = 4  # v - R
    ERROR_SQUARE = 5
    TOKENS = 6


class PolicyOptions(NamedTuple):
    """The options in the form that the kernels take, in the order of csrc/policy/api.h's PolicyOption,
    which has a weight at the end."""

    lower: float  # bounds of the ratio, infinite where there is none
    upper: float
    dual: float
    entropy_coefficient: float
    kl_coefficient: float
    kl_estimator: int  # the index in KL_ESTIMATORS

    @classmethod
    def of(cls, numbers: list[float]) -> PolicyOptions:
        """The options in an op's list: each argument of an op costs some microseconds a call."""
        lower, upper, dual, entropy_coefficient, kl_coefficient, kl_estimator = numbers
        return cls(lower, upper, dual, entropy_coefficient, kl_coefficient, int(kl_estimator))


class PolicyInputs(NamedTuple):
    """What the policy loss reads of each token, all of logp's shape."""

    logp: Tensor
    old_logp: Tensor
    advantages: Tensor
    mask: Tensor  # bool; what stands outside is not used
    entropy: Tensor | None
    reference_logp: Tensor | None
    weights: TokenWeights

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors of tokens, but for the mask."""
        return self.logp, self.old_logp, self.advantages, self.entropy, self.reference_logp


class PolicyOutputs(NamedTuple):
    """What the policy kernel gives.

    loss: a scalar. means [8]: `PolicySum`s over the tokens of the mask.
    grads: d loss / d logp, [1, ..], or d loss / d logp and d loss / d entropy, [2, ..].
    """

    loss: Tensor
    means: Tensor
    grads: Tensor

    @classmethod
    def empty(cls, inputs: PolicyInputs, options: PolicyOptions) -> PolicyOutputs:
        rows = 1 if inputs.entropy is None or options.entropy_coefficient == 0 else 2
        logp, dtype = inputs.logp, accumulator_of(deciding(inputs))
        return cls(
            logp.new_empty((), dtype=dtype),
            logp.new_empty(len(PolicySum), dtype=dtype),
            logp.new_empty(rows, *logp.shape, dtype=dtype),
        )


class ValueInputs(NamedTuple):
    """What the value loss reads of each token, all of values' shape; mask as in PolicyInputs."""

    values: Tensor
    old_values: Tensor
    returns: Tensor
    mask: Tensor
    weights: TokenWeights

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.values, self.old_values, self.returns


class ValueOutputs(NamedTuple):
    """The loss, a scalar; clip_fraction and explained_variance, [2]; d loss / d values, [1, ..]."""

    loss: Tensor
    metrics: Tensor
    grads: Tensor

    @classmethod
    def empty(cls, inputs: ValueInputs) -> ValueOutputs:
        values, dtype = inputs.values, accumulator_of(deciding(inputs))
        return cls(*(values.new_empty(shape, dtype=dtype) for shape in ((), (2,), (1, *values.shape))))


def deciding(inputs: PolicyInputs | ValueInputs) -> Tensor:
    """The tensor whose dtype the kernels compute in (fp32 for less), and whose device they run on."""
    kind, tensor, _ = inputs.weights
    return tensor if tensor is not None and kind == Weighting.GIVEN else widest(*inputs.tensors)


def dense(inputs: PolicyInputs | ValueInputs, dtype: torch.dtype) -> list[Tensor | None]:
    """`tensors` contiguous and in this dtype."""
    return [x if x is None else x.to(dtype).contiguous() for x in inputs.tensors]


# The functions in PyTorch.


def _policy_tokens(inputs: PolicyInputs, options: PolicyOptions) -> PolicyOutputs:
    mask, dtype = inputs.mask, accumulator_of(deciding(inputs))
    logp, old_logp, advantages = (x.to(dtype) for x in inputs[:3])
    d = torch.where(mask, logp - old_logp, 0.0)
    a = torch.where(mask, advantages, 0.0)
    r = d.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT).exp()
    high, low, dual = (
        (a > 0) & (r > options.upper),
        (a < 0) & (r < options.lower),
        (a < 0) & (r > options.dual),
    )
    policy = plain = -a * r
    for beyond, bound in ((high, options.upper), (low, options.lower), (dual, options.dual)):
        policy = torch.where(beyond, -a * bound, policy)
    clipped = high | low | dual
    grad = torch.where(clipped | (d.abs() > LARGEST_EXPONENT), 0.0, plain)
    loss = policy
    entropy = kl = torch.zeros_like(d)
    if inputs.entropy is not None:
        entropy = torch.where(mask, inputs.entropy.to(dtype), 0.0)
        if options.entropy_coefficient:  # with 0 it is a metric alone, and 0 * inf would be NaN
            loss = loss - options.entropy_coefficient * entropy
    if inputs.reference_logp is not None:
        to_reference = torch.where(mask, logp - inputs.reference_logp.to(dtype), 0.0)
        kl, d_kl = _kl(to_reference, options.kl_estimator)
        if options.kl_coefficient:
            loss = loss + options.kl_coefficient * kl
            grad = grad + options.kl_coefficient * d_kl
    weights = torch.where(mask, inputs.weights.as_tensor(mask, dtype), 0.0)
    grads = [weights * grad]
    if inputs.entropy is not None and options.entropy_coefficient:
        grads.append(weights * -options.entropy_coefficient)
    clips = torch.where(policy.isnan(), policy, clipped)  # whether a NaN is clipped is unknown
    rows = (weights * loss, policy, entropy, kl, torch.where(mask, r, 0.0), clips, 0.5 * d * d, mask)
    sums = torch.stack([row.sum(dtype=torch.float64) for row in rows])
    means = sums / sums[PolicySum.TOKENS].clamp(min=1)
    return PolicyOutputs(sums[PolicySum.LOSS].to(dtype, copy=True), means.to(dtype), torch.stack(grads))


def _kl(d: Tensor, estimator: int) -> tuple[Tensor, Tensor]:
    """The estimator at d = logp - reference_logp, and its derivative."""
    if KL_ESTIMATORS[estimator] == "k1":
        return d, torch.ones_like(d)
    if KL_ESTIMATORS[estimator] == "k2":
        return 0.5 * d * d, d
    e = torch.expm1(-d.clamp(min=-LARGEST_EXPONENT))
    return e + d.clamp(min=-LARGEST_EXPONENT), torch.where(d < -LARGEST_EXPONENT, 0.0, -e)


def _value_tokens(inputs: ValueInputs, clip: float) -> ValueOutputs:
    mask, dtype = inputs.mask, accumulator_of(deciding(inputs))
    v, old, target = (torch.where(mask, x.to(dtype), 0.0) for x in inputs[:3])
    weights = torch.where(mask, inputs.weights.as_tensor(mask, dtype), 0.0)
    plain, held = v - target, torch.clamp(v, old - clip, old + clip) - target
    clipped = held * held > plain * plain
    # No comparison with a NaN is true, so a NaN in old is passed on by hand.
    grads = weights * torch.where(old.isnan(), old, torch.where(clipped, 0.0, plain))
    worse = torch.where(old.isnan(), old, torch.where(clipped, held, plain))
    clips = torch.where(worse.isnan(), worse, clipped)
    squares = (target.double() ** 2, plain.double() ** 2)
    rows = (0.5 * weights * worse * worse, clips, target, squares[0], plain, squares[1], mask)
    sums = torch.stack([row.sum(dtype=torch.float64) for row in rows])
    means = sums / sums[ValueSum.TOKENS].clamp(min=1)
    target_square = means[ValueSum.RETURN_SQUARE]
    left = means[ValueSum.ERROR_SQUARE] - means[ValueSum.ERROR] ** 2
    spread = target_square - means[ValueSum.RETURN] ** 2
    # At a smaller spread the difference is rounding.
    explained = torch.where(spread > 1e-12 * target_square, 1 - left / spread, torch.nan)
    return ValueOutputs(
        sums[ValueSum.LOSS].to(dtype, copy=True),
        torch.stack([means[ValueSum.CLIPPED], explained]).to(dtype),
        grads[None],
    )


def _native_policy_tokens(inputs: PolicyInputs, options: PolicyOptions) -> PolicyOutputs:
    dtype, mask = accumulator_of(deciding(inputs)), inputs.mask.contiguous()
    tensor, number = inputs.weights.computed(mask, dtype)
    *tokens, entropy, reference_logp = dense(inputs, dtype)
    given = (*tokens, mask, _contiguous(tensor), entropy, reference_logp)
    return PolicyOutputs(*ops.policy_tokens.default(*given, [*options, number]))


def _native_value_tokens(inputs: ValueInputs, clip: float) -> ValueOutputs:
    dtype, mask = accumulator_of(deciding(inputs)), inputs.mask.contiguous()
    tensor, number = inputs.weights.computed(mask, dtype)
    given = (*dense(inputs, dtype), mask, _contiguous(tensor), clip, number)
    return ValueOutputs(*ops.value_tokens.default(*given))


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


KERNELS = Kernels(
    SimpleNamespace(policy_tokens=_policy_tokens, value_tokens=_value_tokens),
    native=SimpleNamespace(policy_tokens=_native_policy_tokens, value_tokens=_native_value_tokens),
    triton=".policy.losses_triton",
    triton_fp64=False,
)


def run_policy(inputs: PolicyInputs, options: PolicyOptions) -> PolicyOutputs:
    """The loss, the metrics and the gradients of the policy loss, without autograd."""
    return KERNELS.select(deciding(inputs)).policy_tokens(inputs, options)


# The ops.


def _policy(
    logp: Tensor,
    entropy: Tensor | None,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor | None,
    reference_logp: Tensor | None,
    options: list[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """`run_policy`; options as in PolicyOptions, then the kind and the number of TokenWeights."""
    *numbers, kind, number = options
    inputs = PolicyInputs(
        *(logp, old_logp, advantages, mask, entropy, reference_logp), TokenWeights.of(weights, kind, number)
    )
    return run_policy(inputs, PolicyOptions.of(numbers))


def _fake_policy(logp, entropy, old_logp, advantages, mask, weights, reference_logp, options):
    *numbers, kind, number = options
    inputs = PolicyInputs(
        *(logp, old_logp, advantages, mask, entropy, reference_logp), TokenWeights.of(weights, kind, number)
    )
    return PolicyOutputs.empty(inputs, PolicyOptions.of(numbers))


policy_op = register_row_loss("policy_loss", _policy, _fake_policy, losses="ppo_loss")


def _value(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    weights: Tensor | None,
    options: list[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """`ValueOutputs`; options are the clip, infinite for none, and the kind and number of TokenWeights."""
    clip, kind, number = options
    inputs = ValueInputs(values, old_values, returns, mask, TokenWeights.of(weights, kind, number))
    return KERNELS.select(deciding(inputs)).value_tokens(inputs, clip)


def _fake_value(values, old_values, returns, mask, weights, options):
    _, kind, number = options
    given = ValueInputs(values, old_values, returns, mask, TokenWeights.of(weights, kind, number))
    return ValueOutputs.empty(given)


value_op = register_row_loss("value_loss", _value, _fake_value, losses="value_loss")
