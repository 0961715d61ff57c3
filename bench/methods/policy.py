"""PPO's policy loss from hidden states and from log-probabilities, GAE, and whitening: inputs and methods.

From hidden states, N tokens are ROWS sequences of one length with one advantage each, because Liger's GRPO
takes nothing else. The other operations are on N sequences of V tokens, padded at the end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign_kernels import gae, linear_ppo_loss, masked_whiten, ppo_loss

from ..core.operation import (
    COMPILED,
    EAGER,
    OURS,
    Forward,
    Operation,
    Shape,
    compiled,
    here,
    module,
)
from .head import HEAD_ROWS, head_inputs

ROWS = 4
CLIP = 0.2
ENTROPY = 0.01
LIGER_GRPO = "LigerFusedLinearGRPOLoss"
TRL = "TRL ChunkedLogProbFunction, plain loss"


def linear_inputs(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Inputs with ratios of about e^0.1, as in the middle of an update: some are clipped."""
    tensors = head_inputs(shape._replace(N=shape.N // ROWS * ROWS), dtype, device)
    generator = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        hidden, weight = tensors["hidden"].float(), tensors["weight"].float()
        parts = zip(hidden.split(256), tensors["ids"].split(256))
        logp = torch.cat([F.log_softmax(x @ weight.t(), -1).gather(-1, y[:, None])[:, 0] for x, y in parts])
    noise = 0.15 * torch.randn(len(logp), generator=generator, device=device)
    advantages = torch.randn(ROWS, generator=generator, device=device).repeat_interleave(len(logp) // ROWS)
    return tensors | {"old_logp": logp + noise, "advantages": advantages}


def _ours_linear(
    hidden: Tensor, weight: Tensor, ids: Tensor, old_logp: Tensor, advantages: Tensor
) -> dict[str, Tensor]:
    out = linear_ppo_loss(
        hidden, weight, ids, old_logp, advantages, torch.ones_like(ids, dtype=torch.bool), clip=CLIP
    )
    assert out.entropy is not None
    return {"loss": out.loss, "entropy": out.entropy}


def _clipped(logp: Tensor, old_logp: Tensor, advantages: Tensor) -> Tensor:
    ratio = (logp - old_logp).exp()
    return torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP))


def _eager_linear(
    hidden: Tensor, weight: Tensor, ids: Tensor, old_logp: Tensor, advantages: Tensor
) -> dict[str, Tensor]:
    logp = F.log_softmax(F.linear(hidden, weight), -1)
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(-1)
    at_ids = logp.gather(-1, ids[:, None])[:, 0]
    return {"loss": _clipped(at_ids, old_logp, advantages).mean(), "entropy": entropy.mean()}


def _trl(device: str) -> Forward:
    function = module("trl.kernels.chunked_logprob", "trl").ChunkedLogProbFunction

    def forward(
        hidden: Tensor, weight: Tensor, ids: Tensor, old_logp: Tensor, advantages: Tensor
    ) -> dict[str, Tensor]:
        logp, entropy, *_ = function.apply(hidden, weight, None, ids, 1.0, 32768, None, 1.0, ("entropy",))
        return {"loss": _clipped(logp, old_logp, advantages).mean(), "entropy": entropy.mean().detach()}

    return forward


def _liger(device: str) -> Forward:
    """Liger's GRPO, which returns no entropy. It compiles its pieces; on a CPU it runs uncompiled, as in
    Liger's tests."""
    grpo = module("liger_kernel.chunked_loss", "liger-kernel").LigerFusedLinearGRPOLoss
    loss = grpo(
        beta=0.0,
        compiled=device != "cpu",
        use_ref_model=False,
        epsilon_low=CLIP,
        epsilon_high=CLIP,
        loss_type="bnpo",
    )

    def forward(
        hidden: Tensor, weight: Tensor, ids: Tensor, old_logp: Tensor, advantages: Tensor
    ) -> dict[str, Tensor]:
        rows = {
            name: x.unflatten(0, (ROWS, -1))
            for name, x in (("hidden", hidden), ("ids", ids), ("old", old_logp), ("a", advantages))
        }
        mask = torch.ones_like(rows["ids"])
        return {
            "loss": loss(
                rows["hidden"], weight, rows["ids"], mask, rows["a"][:, 0], old_per_token_logps=rows["old"]
            )[0]
        }

    return forward


def token_inputs(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Inputs of the policy loss, with advantages around 1.

    Around 0 the mean would be a small difference of large sums, and its error a matter of luck.
    """
    generator = torch.Generator(device).manual_seed(0)
    logp, noise, advantages, entropy = torch.randn(4, shape.N, shape.V, generator=generator, device=device)
    lengths = torch.randint(shape.V // 2, shape.V + 1, (shape.N, 1), generator=generator, device=device)
    tensors = {
        "logp": logp - 2,
        "entropy": entropy.abs(),
        "old_logp": logp - 2 + 0.15 * noise,
        "advantages": advantages + 1,
    }
    return {name: x.to(dtype) for name, x in tensors.items()} | {
        "mask": torch.arange(shape.V, device=device) < lengths
    }


def _ours_ppo(
    logp: Tensor, entropy: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor
) -> dict[str, Tensor]:
    out = ppo_loss(logp, old_logp, advantages, mask, clip=CLIP, entropy=entropy, entropy_coefficient=ENTROPY)
    return {name: x for name, x in out._asdict().items() if x is not None}


def _masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum()


def _eager_ppo(
    logp: Tensor, entropy: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor
) -> dict[str, Tensor]:
    """The loss of TRL's PPO trainer, with its metrics over the mask."""
    difference = logp - old_logp
    ratio = difference.exp()
    free, held = -advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP)
    policy, mean_entropy = _masked_mean(torch.max(free, held), mask), _masked_mean(entropy, mask)
    with torch.no_grad():
        metrics = {
            "policy_loss": policy.detach(),
            "entropy": mean_entropy.detach(),
            "mean_ratio": _masked_mean(ratio, mask),
            "clip_fraction": _masked_mean((held > free).to(ratio), mask),
            "approx_kl": 0.5 * _masked_mean(difference**2, mask),
        }
    return {"loss": policy - ENTROPY * mean_entropy, **metrics}


def episode_inputs(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    tensors = token_inputs(shape, dtype, device)
    return {
        "rewards": tensors["advantages"] * tensors["mask"],
        "values": tensors["logp"] * tensors["mask"],
        "mask": tensors["mask"],
    }


GAMMA, LAMBDA = 0.99, 0.95


def _ours_gae(rewards: Tensor, values: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return gae(rewards, values, mask, gamma=GAMMA, lam=LAMBDA)._asdict()


def _eager_gae(rewards: Tensor, values: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The loop of TRL's PPO trainer. Rewards and values are 0 in the padding, and so are the advantages."""
    running, backwards = torch.zeros_like(values[:, 0]), []
    for t in reversed(range(values.shape[1])):
        following = values[:, t + 1] if t + 1 < values.shape[1] else 0.0
        running = rewards[:, t] + GAMMA * following - values[:, t] + GAMMA * LAMBDA * running
        backwards.append(running)
    advantages = torch.stack(backwards[::-1], 1)
    return {"advantages": advantages, "returns": advantages + values}


def advantage_inputs(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    tensors = token_inputs(shape, dtype, device)
    return {"advantages": tensors["advantages"], "mask": tensors["mask"]}


def _ours_whiten(advantages: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {"whitened": masked_whiten(advantages, mask)}


def _eager_whiten(advantages: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """TRL's masked_whiten with the line of its trainer that sets the padding to 0."""
    mean, tokens = _masked_mean(advantages, mask), mask.sum()
    variance = _masked_mean((advantages - mean) ** 2, mask) * (tokens / (tokens - 1))
    whitened = (advantages - mean) * torch.rsqrt(variance + 1e-8)
    return {"whitened": whitened.masked_fill(~mask, 0)}


POLICY = {
    "linear_ppo": Operation(
        linear_inputs,
        {
            OURS: here(_ours_linear),
            EAGER: here(_eager_linear),
            COMPILED: compiled(_eager_linear),
            TRL: _trl,
            LIGER_GRPO: _liger,
        },
        (*HEAD_ROWS, "old_logp", "advantages"),
    ),
    "ppo": Operation(
        token_inputs,
        {OURS: here(_ours_ppo), EAGER: here(_eager_ppo), COMPILED: compiled(_eager_ppo)},
        (),
        whole=lambda rows: _eager_ppo,
    ),
    "gae": Operation(
        episode_inputs, {OURS: here(_ours_gae), EAGER: here(_eager_gae)}, (), whole=lambda rows: _eager_gae
    ),
    "whiten": Operation(
        advantage_inputs,
        {OURS: here(_ours_whiten), EAGER: here(_eager_whiten), COMPILED: compiled(_eager_whiten)},
        (),
        whole=lambda rows: _eager_whiten,
    ),
}
