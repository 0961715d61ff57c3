"""Logits in memory: statistics and gradients of their rows, sums of their columns."""
