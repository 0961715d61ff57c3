"""What PPO's loss on the head takes beside the head: its keywords, and the tensors of its tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from .. import checks
from ..keywords import flat_signature, pick
from ..policy.arguments import (
    PolicyArguments,
    PolicyNumbers,
    PolicySettings,
    PolicyTensors,
    as_bool,
    check_tokens,
    per_token,
    policy_options,
    token_weights,
)
from ..policy.losses import ppo_loss
from ..policy.ops import PolicyOptions
from ..softmax.rows import accumulator_dtype
from .inputs import HeadInputs, head_inputs
from .options import HEAD_DEFAULTS, HeadArguments, HeadSettings, head_options


class LinearPolicySettings(PolicySettings, HeadSettings, total=False):
    """The options of `linear_ppo_loss`."""


class LinearPolicyArguments(PolicyArguments, HeadArguments, total=False):
    """All keywords of `linear_ppo_loss`."""


POLICY_NUMBERS = tuple(PolicyNumbers.__annotations__)  # in the order of `policy_options`
POLICY_TENSORS = PolicyTensors.__optional_keys__
POLICY_ARGUMENTS = PolicyArguments.__optional_keys__
LINEAR_POLICY_SETTINGS = LinearPolicySettings.__optional_keys__
LINEAR_POLICY_ARGUMENTS = LinearPolicyArguments.__optional_keys__
POLICY_DEFAULTS = pick(ppo_loss.__kwdefaults__ or {}, POLICY_ARGUMENTS)
policy_keywords = flat_signature(
    {**HEAD_DEFAULTS, **POLICY_DEFAULTS}, PolicyArguments.__doc__, HeadArguments.__doc__
)


class TokenTensors(NamedTuple):
    """The tensors of `ppo_loss` beside ids."""

    old_logp: Tensor | None
    advantages: Tensor
    mask: Tensor
    reference_logp: Tensor | None

    def checked(self, hidden: Tensor, ids: Tensor, kl_coefficient: float) -> TokenTensors:
        """A copy with advantages of ids' shape and the mask as bool, whose tensors were checked.

        Raises:
            ValueError: a tensor of the wrong shape, dtype or device, or a KL without its reference.
        """
        old_logp, advantages, mask, reference_logp = self
        checks.shardable(hidden=hidden)
        checks.tensors(ids=ids, advantages=advantages)
        checks.optional_tensors(old_logp=old_logp, reference_logp=reference_logp)
        if reference_logp is None and kl_coefficient:
            raise ValueError(
                f"reference_logp: got None with kl_coefficient={kl_coefficient}, "
                "expected a tensor of the shape of ids"
            )
        advantages = per_token(advantages, ids.shape)
        for name, tensor in (("old_logp", old_logp), ("advantages", advantages)):
            if tensor is not None:
                checks.shape(name, tensor, tuple(ids.shape), "the shape of ids")
        floats = {"advantages": advantages, "old_logp": old_logp, "reference_logp": reference_logp}
        check_tokens(floats, mask)
        checks.device("ids", ids, "hidden", hidden)
        checks.device("mask", mask, "ids", ids)
        checks.dtype("ids", ids, checks.INTEGERS)
        return TokenTensors(old_logp, advantages, as_bool(mask), reference_logp)

    def flat(self) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """old_logp, advantages, reference_logp: [N] each, without gradient."""
        old_logp, advantages, _, reference_logp = self
        return _flat(old_logp), advantages.detach().reshape(-1), _flat(reference_logp)


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().reshape(-1)


class PolicyCall(NamedTuple):
    """What `linear_ppo_loss` was given, checked."""

    inputs: HeadInputs
    tokens: TokenTensors  # of which ignored ones are outside the mask too
    keywords: dict[str, Any]  # those of `ppo_loss`
    options: PolicyOptions

    def scale(self) -> Tensor:
        """The weight of each token in the loss: [1] or [N]."""
        aggregation, normalizer, cu_seqlens = (
            self.keywords[name] for name in ("aggregation", "normalizer", "cu_seqlens")
        )
        dtype = accumulator_dtype(self.inputs.hidden.dtype)
        mask, weights = token_weights(self.tokens.mask, aggregation, normalizer, cu_seqlens, dtype)
        return weights.as_tensor(mask, dtype).reshape(-1)


def policy_call(
    function: Callable[..., object],
    head: tuple[Tensor, Tensor, Tensor, Tensor | None],
    tokens: TokenTensors,
    given: LinearPolicyArguments,
) -> PolicyCall:
    """Check the tensors of a head (hidden, weight, ids, bias), of its tokens, and the keywords of `function`.

    Raises:
        TypeError: a keyword that the function does not take.
        ValueError: an argument of the wrong shape, dtype, device or range, or no option's name.
    """
    options = head_options(function, given, LINEAR_POLICY_ARGUMENTS)
    keywords = {**POLICY_DEFAULTS, **pick(given, POLICY_ARGUMENTS)}
    policy = policy_options(*[keywords[name] for name in POLICY_NUMBERS])
    hidden, _, ids, _ = head
    tokens = tokens.checked(hidden, ids, policy.kl_coefficient)
    inputs = head_inputs(*head, options, mask=tokens.mask)
    inside = inputs.ids.view(ids.shape) >= 0
    return PolicyCall(inputs, tokens._replace(mask=inside), keywords, policy)
