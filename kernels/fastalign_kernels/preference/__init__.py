"""Losses of pairs and of labelled completions from log-probabilities, O(S)."""
