"""Losses and statistics from hidden states and the head's weight, without logits in memory."""
