"""What PPO and GRPO share: completions, their scores, and the loop that learns from them."""
