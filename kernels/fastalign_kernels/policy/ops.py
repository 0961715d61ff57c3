"""The ops of the policy losses: one pass over tokens gives sums, and the gradients of the inputs.

The backward pass scales the gradients in place by the upstream gradient, so a second derivative is an error.
Sums are taken over fixed blocks and added in fp64, so they do not depend on the number of threads. Bytes: 3
to 5 N e and N read, N e or 2 N e written.

A CPU runs csrc/policy/losses.h, a GPU losses_triton.py. The functions of this file run where the native
library is missing, and for fp64 on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from ..autograd import (
    InputGrads,
    NamedGrads,
    first_order,
    register_op,
    save_loss,
    saved_inputs,
    scale_saved_grads,
)
from ..dispatch import Kernels

KL_ESTIMATORS = ("k1", "k2", "k3")
LARGEST_EXPONENT = 20.0


class PolicySum(IntEnum):
    """Sums over the mask that policy_tokens writes, [8] fp64.

    csrc/policy/losses.h and policy/losses_triton.py write them in this order.
    """

    LOSS = 0  # times the scale
    POLICY = 1
    ENTROPY = 2
    KL = 3
    RATIO = 4
    CLIPPED = 5
    SQUARES = 6  # d^2 / 2
    TOKENS = 7


class ValueSum(IntEnum):
    """Sums over the mask that value_tokens writes, [7] fp64."""

    LOSS = 0  # times the scale
    CLIPPED = 1
    RETURN = 2
    RETURN_SQUARE = 3
    ERROR = 4  # v - R
    ERROR_SQUARE = 5
    TOKENS = 6


class PolicyOptions(NamedTuple):
    """The options in the form that the kernels take: bounds of the ratio, infinite where there is none, and
    the estimator's index."""

    lower: float
    upper: float
    dual: float
    entropy_coefficient: float
    kl_coefficient: float
    kl_estimator: int

    @classmethod
    def of(cls, numbers: list[float]) -> PolicyOptions:
        """From a list, as which ops take them: each argument of an op costs some microseconds a call."""
        lower, upper, dual, entropy_coefficient, kl_coefficient, kl_estimator = numbers
        return cls(lower, upper, dual, entropy_coefficient, kl_coefficient, int(kl_estimator))


class PolicyInputs(NamedTuple):
    """What the policy loss reads of each token, all of logp's shape."""

    logp: Tensor
    old_logp: Tensor
    advantages: Tensor
    mask: Tensor  # bool; what stands outside is not used
    scale: Tensor  # [1], or one for each token; fp32 or fp64, in which the kernels compute
    entropy: Tensor | None
    reference_logp: Tensor | None

    def dense(self) -> PolicyInputs:
        """Contiguous, in the dtype of scale."""
        dtype = self.scale.dtype
        return PolicyInputs(
            self.logp.to(dtype).contiguous(),
            self.old_logp.to(dtype).contiguous(),
            self.advantages.to(dtype).contiguous(),
            self.mask.contiguous(),
            self.scale.contiguous(),
            None if self.entropy is None else self.entropy.to(dtype).contiguous(),
            None if self.reference_logp is None else self.reference_logp.to(dtype).contiguous(),
        )


class PolicyOutputs(NamedTuple):
    """What the policy kernel writes: `PolicySum`s [8] fp64, and the gradients.

    grads is d loss / d logp, [1, ..], or d loss / d logp and d loss / d entropy, [2, ..].
    """

    sums: Tensor
    grads: Tensor

    @classmethod
    def empty(cls, inputs: PolicyInputs, options: PolicyOptions) -> PolicyOutputs:
        rows = 1 if inputs.entropy is None or options.entropy_coefficient == 0 else 2
        scale = inputs.scale
        return cls(
            scale.new_empty(len(PolicySum), dtype=torch.float64), scale.new_empty(rows, *inputs.logp.shape)
        )


class ValueInputs(NamedTuple):
    """What the value loss reads of each token, all of values' shape; mask and scale as in PolicyInputs."""

    values: Tensor
    old_values: Tensor
    returns: Tensor
    mask: Tensor
    scale: Tensor


# The functions in PyTorch. They write into `out`, or into their last two arguments.


def _policy_tokens(inputs: PolicyInputs, options: PolicyOptions, out: PolicyOutputs) -> None:
    sums, grads = out
    mask = inputs.mask
    d = torch.where(mask, inputs.logp - inputs.old_logp, 0.0)
    a = torch.where(mask, inputs.advantages, 0.0)
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
    entropy = kl = torch.zeros_like(grads[0])
    if inputs.entropy is not None:
        entropy = torch.where(mask, inputs.entropy, 0.0)
        loss = loss - options.entropy_coefficient * entropy
    if inputs.reference_logp is not None:
        kl, d_kl = _kl(torch.where(mask, inputs.logp - inputs.reference_logp, 0.0), options.kl_estimator)
        loss = loss + options.kl_coefficient * kl
        grad = grad + options.kl_coefficient * d_kl
    scale = torch.where(mask, inputs.scale, 0.0)
    torch.mul(scale, grad, out=grads[0])
    if grads.shape[0] > 1:
        torch.mul(scale, -options.entropy_coefficient, out=grads[1])
    clips = torch.where(policy.isnan(), policy, clipped)  # whether a NaN is clipped is unknown
    rows = (scale * loss, policy, entropy, kl, torch.where(mask, r, 0.0), clips, 0.5 * d * d, mask)
    sums.copy_(torch.stack([row.sum(dtype=torch.float64) for row in rows]))


def _kl(d: Tensor, estimator: int) -> tuple[Tensor, Tensor]:
    """The estimator at d = logp - reference_logp, and its derivative."""
    if KL_ESTIMATORS[estimator] == "k1":
        return d, torch.ones_like(d)
    if KL_ESTIMATORS[estimator] == "k2":
        return 0.5 * d * d, d
    e = torch.expm1(-d.clamp(min=-LARGEST_EXPONENT))
    return e + d.clamp(min=-LARGEST_EXPONENT), torch.where(d < -LARGEST_EXPONENT, 0.0, -e)


def _value_tokens(inputs: ValueInputs, clip: float, sums: Tensor, grads: Tensor) -> None:
    given = (inputs.values, inputs.old_values, inputs.returns, inputs.scale)
    v, old, target, scale = (torch.where(inputs.mask, x, 0.0) for x in given)
    plain, held = v - target, torch.clamp(v, old - clip, old + clip) - target
    clipped = held * held > plain * plain
    # No comparison with a NaN is true, so a NaN in old is passed on by hand.
    torch.mul(scale, torch.where(old.isnan(), old, torch.where(clipped, 0.0, plain)), out=grads)
    worse = torch.where(old.isnan(), old, torch.where(clipped, held, plain))
    clips = torch.where(worse.isnan(), worse, clipped)
    squares = (target.double() ** 2, plain.double() ** 2)
    rows = (0.5 * scale * worse * worse, clips, target, squares[0], plain, squares[1], inputs.mask)
    sums.copy_(torch.stack([row.sum(dtype=torch.float64) for row in rows]))


def _native_policy_tokens(inputs: PolicyInputs, options: PolicyOptions, out: PolicyOutputs) -> None:
    torch.ops.fastalign.policy_tokens(*inputs, *options, *out)


def _native_value_tokens(inputs: ValueInputs, clip: float, sums: Tensor, grads: Tensor) -> None:
    torch.ops.fastalign.value_tokens(*inputs, clip, sums, grads)


KERNELS = Kernels(
    SimpleNamespace(policy_tokens=_policy_tokens, value_tokens=_value_tokens),
    native=SimpleNamespace(policy_tokens=_native_policy_tokens, value_tokens=_native_value_tokens),
    triton=".policy.losses_triton",
    triton_fp64=False,
)


# The ops.


def policy_sums(inputs: PolicyInputs, options: PolicyOptions) -> PolicyOutputs:
    """The sums and the gradients of the policy loss, without autograd."""
    out = PolicyOutputs.empty(inputs, options)
    KERNELS.select(out.grads).policy_tokens(inputs.dense(), options, out)
    return out


def _policy(
    logp: Tensor,
    entropy: Tensor | None,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    scale: Tensor,
    reference_logp: Tensor | None,
    options: list[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and `policy_sums`."""
    inputs = PolicyInputs(logp, old_logp, advantages, mask, scale, entropy, reference_logp)
    sums, grads = policy_sums(inputs, PolicyOptions.of(options))
    return sums[PolicySum.LOSS].to(scale.dtype, copy=True), sums, grads


def _fake_policy(logp, entropy, old_logp, advantages, mask, scale, reference_logp, options):
    inputs = PolicyInputs(logp, old_logp, advantages, mask, scale, entropy, reference_logp)
    return scale.new_empty(()), *PolicyOutputs.empty(inputs, PolicyOptions.of(options))


def _policy_grads(ctx, saved: Sequence[Tensor], upstream: Tensor | None, *_: None) -> InputGrads:
    inputs = saved_inputs(ctx, saved)
    none = (None,) * len(inputs)
    if upstream is None:
        return none
    (grads,) = scale_saved_grads(ctx, upstream, lambda: _policy(*inputs)[2:])
    of_inputs = [row.to(x.dtype) for row, x in zip(grads, inputs)]
    return *of_inputs, *none[len(of_inputs) :]


_policy_backward = first_order("ppo_loss", _policy_grads)
policy_op = torch.library.custom_op("fastalign::policy_loss", _policy, mutates_args=())
policy_op.register_fake(_fake_policy)
policy_op.register_autograd(_policy_backward, setup_context=save_loss)


class EagerPolicy(torch.autograd.Function):
    """policy_op without torch's dispatcher.

    The dispatcher's Python layers take 30 us a call, as long as the kernel takes for [64, 1024] tokens.
    There is no setup_context either: with one, torch inspects the signature of forward at each call, 12 us.
    """

    @staticmethod
    def forward(ctx, *inputs):
        output = _policy(*inputs)
        save_loss(ctx, inputs, output)
        return output

    backward = staticmethod(_policy_backward)


def _value(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, scale: Tensor, clip: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, `ValueSum`s [7] fp64 and d loss / d values; mask and scale as in PolicyInputs."""
    v, old, target = (x.to(scale.dtype).contiguous() for x in (values, old_values, returns))
    sums, grads = scale.new_empty(len(ValueSum), dtype=torch.float64), scale.new_empty(values.shape)
    KERNELS.select(grads).value_tokens(
        ValueInputs(v, old, target, mask.contiguous(), scale), clip, sums, grads
    )
    return sums[ValueSum.LOSS].to(scale.dtype, copy=True), sums, grads


def _fake_value(values, old_values, returns, mask, scale, clip):
    sums = scale.new_empty(len(ValueSum), dtype=torch.float64)
    return scale.new_empty(()), sums, scale.new_empty(values.shape)


def _save_value(ctx, inputs, output) -> None:
    _, sums, grads = output
    ctx.mark_non_differentiable(sums, grads)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], grads)


def _value_grads(ctx, saved: Sequence[Tensor], upstream: Tensor | None, *_: None) -> NamedGrads:
    values, grads = saved
    return {} if upstream is None else {"values": (upstream * grads).to(values.dtype)}


value_op = register_op(
    "value_loss", _value, _fake_value, save=_save_value, backward=_value_grads, losses="value_loss"
)
