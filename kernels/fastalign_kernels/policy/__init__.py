"""Losses and advantages of policy optimisation from log-probabilities, O(N)."""
