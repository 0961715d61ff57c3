"""One step of PPO, rollout and update, of a Llama of the demo's architecture: ours, and plain PyTorch's.

Both complete the same prompts with top-p 0.9, and train the policy over all ids. Both have a frozen reference
and a value head on the shared backbone, take one pass over the completions, clip the gradient and step AdamW.
Scores are given. Plain PyTorch draws with transformers' generate and holds the logits of one pass at a time.
A step moves the weights, so only a method's first step is checked.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastalign.measure import Error, largest_error

from ..core.operation import EAGER, OURS, Check, Forward, Operation, Shape, Tensors, Verdict, module
from .sampling import EDGE

ROWS, PROMPT = 64, 8  # prompts, and tokens of each
TOP_P, CLIP, VF_COEF, LEARNING_RATE = 0.9, 0.2, 0.1, 1e-5
LAYERS, WIDER, HEAD_SIZE = 4, 3, 32  # the demo's: 4 layers of H 128, inner 384, 4 heads
NATS = 1e-4  # allowed error of a log-probability and of the mean entropy
GRADIENT = 1e-4  # allowed error of the gradient, as a share of its largest element


def ppo_inputs(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Inputs for N tokens to draw in at most 64 rows. Logits have a standard deviation of 2."""
    generator = torch.Generator().manual_seed(0)
    rows = min(ROWS, shape.N)
    tensors = {
        "embedding": torch.randn(shape.V, shape.H, generator=generator) * 0.02,
        "weight": torch.randn(shape.V, shape.H, generator=generator) * (2 / math.sqrt(shape.H)),
        "scores": torch.randn(rows, generator=generator),
    }
    ids = torch.randint(0, shape.V, (rows, PROMPT), generator=generator)
    new = torch.zeros(shape.N // rows, dtype=torch.int64)  # its length is the number of tokens of a row
    return {name: tensor.to(device, dtype) for name, tensor in tensors.items()} | {
        "ids": ids.to(device),
        "new": new.to(device),
    }


def policy(embedding: Tensor, weight: Tensor, new: Tensor, **_: Tensor) -> Any:
    """The model of the inputs; the layers between embedding and head come from seed 0."""
    transformers = module("transformers", "transformers")
    V, H = weight.shape
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=H,
        intermediate_size=WIDER * H,
        num_hidden_layers=LAYERS,
        num_attention_heads=max(1, H // HEAD_SIZE),
        max_position_embeddings=PROMPT + len(new),
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).to(weight.device, weight.dtype)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(embedding)
        model.get_output_embeddings().weight.copy_(weight)
    return model.eval()


def _ours(device: str) -> Forward:
    module("peft", "peft")
    from fastalign.actor_critic import ActorCritic
    from fastalign.causal_lm import fuse_head
    from fastalign.data import Prompt
    from fastalign.stages.ppo import PPOOptions, ppo_step, rollout

    made: dict[int, Any] = {}

    def forward(ids: Tensor, scores: Tensor, new: Tensor, **weights: Tensor) -> dict[str, Tensor]:
        if not made:
            model = ActorCritic(fuse_head(policy(new=new, **weights)))
            made[0] = (
                model,
                copy.deepcopy(model.policy),
                torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True),
            )
        model, reference, optimizer = made[0]
        gradient = _noted(optimizer, model.policy)
        options = PPOOptions(
            max_new_tokens=len(new),
            top_p=TOP_P,
            filtered_policy=False,
            lam=1.0,
            clip=CLIP,
            vf_coef=VF_COEF,
            ppo_epochs=1,
        )
        prompts = [Prompt(row) for row in ids.tolist()]
        with torch.enable_grad():
            drawn = rollout(
                model, prompts, lambda *_: scores, options, eos_id=[], pad_id=0, reference=reference
            )
            entropy = ppo_step(model, optimizer, drawn, options, pad_id=0)["policy/entropy_avg"]
        tokens = torch.tensor(drawn.completions, device=ids.device)
        return {
            "tokens": tokens,
            "logp": drawn.old_logp,
            "entropy": torch.tensor(entropy),
            "d weight": gradient(),
        }

    return forward


def _plain(device: str) -> Forward:
    module("transformers", "transformers")
    made: dict[int, Any] = {}

    def forward(ids: Tensor, scores: Tensor, new: Tensor, **weights: Tensor) -> dict[str, Tensor]:
        if not made:
            model = policy(new=new, **weights)
            head = nn.Linear(model.config.hidden_size, 1, device=ids.device, dtype=scores.dtype)
            for weight in head.parameters():
                nn.init.zeros_(weight)
            made[0] = (
                model,
                copy.deepcopy(model),
                head,
                torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=LEARNING_RATE, fused=True),
            )
        model, reference, head, optimizer = made[0]
        gradient = _noted(optimizer, model)
        sampling = {
            "do_sample": True,
            "top_p": TOP_P,
            "top_k": 0,
            "pad_token_id": 0,
            "max_new_tokens": len(new),
        }
        sequences = model.generate(ids, attention_mask=torch.ones_like(ids), **sampling)
        tokens = sequences[:, ids.shape[1] :]

        def logits_of(scored: Any) -> tuple[Tensor, Tensor]:
            hidden = scored.model(sequences, use_cache=False).last_hidden_state[:, ids.shape[1] - 1 : -1]
            return scored.lm_head(hidden), hidden

        with torch.no_grad():
            logits, hidden = logits_of(model)
            old = logits.log_softmax(-1).gather(2, tokens[..., None])[..., 0]
            values = head(hidden)[..., 0]
            del logits
            logits, _ = logits_of(reference)
            divergence = old - logits.log_softmax(-1).gather(2, tokens[..., None])[..., 0]
            del logits
            rewards = -0.05 * divergence
            rewards[:, -1] += scores
            returns = rewards.flip(1).cumsum(1).flip(1)  # gamma and lambda 1
            advantages = returns - values
            advantages = (advantages - advantages.mean()) / (advantages.var() + 1e-8).sqrt()
        with torch.enable_grad():
            logits, hidden = logits_of(model)
            table = logits.log_softmax(-1)
            del logits
            ratio = (table.gather(2, tokens[..., None])[..., 0] - old).exp()
            loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
            entropy = -(table.detach().exp() * table.detach()).sum(-1).mean()
            new_values = head(hidden)[..., 0]
            held = values + (new_values - values).clamp(-CLIP, CLIP)
            value = 0.5 * torch.maximum((new_values - returns) ** 2, (held - returns) ** 2).mean()
            (loss + VF_COEF * value).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return {"tokens": tokens, "logp": old, "entropy": entropy, "d weight": gradient()}

    return forward


def _noted(optimizer: torch.optim.Optimizer, model: Any) -> Callable[[], Tensor]:
    """The head's gradient at the next step of the optimizer."""
    weight = model.get_output_embeddings().weight
    found: list[Tensor] = []
    hook = optimizer.register_step_pre_hook(lambda *_: found.append(weight.grad.clone()))

    def gradient() -> Tensor:
        hook.remove()
        return found[0]

    return gradient


def a_step_from_the_start(tensors: Tensors) -> Check:
    """The judge of a method's first step, in fp64.

    Tokens must lie within top-p. Their log-probabilities, the entropy and the head's gradient must be right.
    """
    model = policy(**{name: t.double() if t.is_floating_point() else t for name, t in tensors.items()})
    scores, ids, weight = tensors["scores"].double(), tensors["ids"], tensors["weight"].double()

    def check(results: Tensors) -> Verdict:
        tokens = results["tokens"]
        B, R = tokens.shape
        advantages = scores[:, None].expand(B, R)
        advantages = (advantages - advantages.mean()) / (advantages.var() + 1e-8).sqrt()
        logp, entropy, gradient, outside = (
            torch.empty_like(advantages),
            torch.empty_like(advantages),
            torch.zeros_like(weight),
            0,
        )
        with torch.no_grad():
            for row in range(B):  # the logits of one row at a time
                hidden = model.model(
                    torch.cat((ids[row], tokens[row]))[None], use_cache=False
                ).last_hidden_state[0, ids.shape[1] - 1 : -1]
                table = F.linear(hidden, weight).log_softmax(-1)
                probs = table.exp()
                entropy[row] = -(probs * table).sum(-1)
                at = tokens[row][:, None]
                drawn = probs.gather(1, at)
                outside += int(((probs * (probs > drawn)).sum(1) > TOP_P + EDGE).sum())
                logp[row] = drawn[:, 0].log()
                grads = -advantages[row] / (B * R)
                gradient -= (probs * grads[:, None]).t() @ hidden
                gradient.index_add_(0, tokens[row], grads[:, None] * hidden)
        # Both methods clip the gradient, so only its direction is compared.
        true = {"logp": logp, "entropy": entropy.mean(), "d weight": gradient / gradient.norm()}
        found = results["d weight"].double()
        errors = largest_error(
            {**{name: results[name] for name in ("logp", "entropy")}, "d weight": found / found.norm()}, true
        )
        errors["tokens"] = Error(outside, outside / tokens.numel())
        if outside:
            return Verdict(errors, f"wrong: {outside} of {tokens.numel()} tokens drawn outside the kept set")
        allowed = {"logp": NATS, "entropy": NATS, "d weight": GRADIENT * true["d weight"].abs().max().item()}
        for name, limit in allowed.items():
            if not errors[name].absolute <= limit:  # NaN is wrong too
                return Verdict(
                    errors, f"wrong: {name} is off by {errors[name].absolute:.2e}, {limit:.0e} allowed"
                )
        return Verdict(errors, "")

    return check


def head_gemms(tensors: Tensors) -> Callable[[], object]:
    """The head's GEMMs: one for each token of the rollout, one for the reference, three for the update."""
    weight = tensors["weight"].detach()
    B, R = len(tensors["ids"]), len(tensors["new"])
    row, whole = weight.new_ones(B, weight.shape[1]), weight.new_ones(B * R, weight.shape[1])

    def products() -> object:
        for _ in range(R):
            row @ weight.t()
        whole @ weight.t()
        logits = whole @ weight.t()
        return logits @ weight, logits.t() @ whole

    return products


PPO = {"ppo_step": Operation(ppo_inputs, {OURS: _ours, EAGER: _plain}, ("ids",), a_step_from_the_start)}
