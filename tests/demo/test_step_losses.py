"""The plain losses are the stages' own: here PPO's; tests/bench/test_bench.py has the others in whole steps,
tests/demo/test_demo.py all of them."""

import torch
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from fastalign.actor_critic import ActorCritic
from fastalign.causal_lm import fuse_head
from fastalign.classifier import score_packed
from fastalign.data import Prompt
from fastalign.stages.ppo import PPOConfig, experience_batch, rollout
from fastalign.step_losses import fused_loss, plain_loss


def test_ppo_has_one_loss_and_one_gradient() -> None:
    torch.manual_seed(0)
    architecture = GPT2Config(
        vocab_size=60, n_embd=16, n_layer=1, n_head=2, n_positions=32, num_labels=1, pad_token_id=1
    )
    policy, value = (
        GPT2LMHeadModel(architecture).double().eval(),
        GPT2ForSequenceClassification(architecture).double().eval(),
    )
    model = ActorCritic(fuse_head(policy), score_packed(value))
    config = PPOConfig(
        model="none",
        reward="none",
        train_data="none",
        output_dir="none",
        max_new_tokens=8,
        temperature=0.8,
        clip=0.02,
        value_clip=0.01,
    )
    prompts = [Prompt(list(range(2, 3 + length))) for length in range(9)]
    drawn = rollout(
        model,
        prompts,
        lambda _, completions: [len(ids) % 3 for ids in completions],
        config,
        eos_id=0,
        pad_id=1,
    )
    with torch.no_grad():  # so that ratios leave the clip's range, and values theirs
        for weight in model.parameters():
            weight.add_(0.03 * torch.randn_like(weight))
    batch = experience_batch(drawn, list(range(9)), options=config, pad_id=1, packing=True)
    weights = [weight for part in model.parts().values() for weight in part]
    found = []
    for make in (fused_loss, plain_loss):
        loss = make("ppo", config, model, batch)()
        found.append([loss.double(), *torch.autograd.grad(loss, weights)])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-9)
