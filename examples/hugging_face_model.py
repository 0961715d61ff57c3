"""A transformers model whose loss runs through the fused head. Use from_pretrained for a real model."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastalign.causal_lm import fuse_head


def main() -> tuple[float, float]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    ids = torch.randint(1000, (4, 32))
    with torch.no_grad():
        plain = model(input_ids=ids, labels=ids).loss.item()

    fuse_head(model)  # compares losses and logits on a probe of ten tokens, and refuses a model that differs
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    print(f"loss {plain:.5f} with logits, {output.loss.item():.5f} without them")

    statistics = model(input_ids=ids, labels=ids, token_stats=True)  # differentiable, for a loss of your own
    print(f"mean entropy {statistics.entropy.mean().item():.3f} nats")
    return plain, output.loss.item()


if __name__ == "__main__":
    main()
