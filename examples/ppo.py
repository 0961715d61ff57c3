"""A rollout that returns the policy's log-probabilities, and a PPO update from hidden states on it."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import fastalign
from fastalign import rollout


def main() -> list[float]:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=100, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    policy = GPT2LMHeadModel(config).eval()  # eval: without dropout
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    prompts = torch.full((32, 4), 7)
    scores = []
    for step in range(8):
        drawn = rollout.generate(
            policy, prompts, torch.ones_like(prompts), max_new_tokens=8, seed=step, eos_id=0, pad_id=1
        )
        score = ((drawn.tokens < 50) & drawn.mask).sum(1).float()  # the reward: tokens below 50
        advantages = (score - score.mean())[:, None].expand_as(drawn.logp).contiguous()

        ids = torch.cat([prompts, drawn.tokens], 1)
        hidden = policy.transformer(ids[:, :-1]).last_hidden_state[:, prompts.shape[1] - 1 :]
        result = fastalign.linear_ppo_loss(
            hidden, policy.lm_head.weight, drawn.tokens, drawn.logp, advantages, drawn.mask, clip=0.2
        )
        result.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scores.append(score.mean().item())
        print(f"step {step}: score {scores[-1]:.2f} of 8, ratio {result.mean_ratio.item():.4f}")
    return scores


if __name__ == "__main__":
    main()
