"""DPO from hidden states. The loss runs the head on policy and reference, one pair at a time."""

import copy

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import fastalign


def main() -> list[float]:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=500, n_embd=64, n_layer=2, n_head=2, n_positions=64)
    policy = GPT2LMHeadModel(config).eval()  # eval: without dropout
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4)

    pairs = 4
    ids = torch.randint(500, (2 * pairs, 24))  # the chosen rows first, then the rejected ones
    targets = ids[:, 1:].clone()
    targets[:, :8] = -100  # the prompt: no loss, and no work in the head
    losses = []
    for step in range(8):
        hidden = policy.transformer(ids[:, :-1]).last_hidden_state
        with torch.no_grad():
            reference_hidden = reference.transformer(ids[:, :-1]).last_hidden_state
        result = fastalign.linear_dpo_loss(
            hidden,
            policy.lm_head.weight,
            targets,
            reference_hidden=reference_hidden,
            reference_weight=reference.lm_head.weight,
            beta=0.1,
        )
        result.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(result.loss.item())
        margin = (result.chosen_rewards - result.rejected_rewards).mean().item()
        print(f"step {step}: loss {losses[-1]:.4f}, margin {margin:.4f}")
    return losses


if __name__ == "__main__":
    main()
