"""Trainings that answer a question; their tables stand in docs/."""
