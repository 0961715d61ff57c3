"""Models of the stages: where they come from, how they lie on the ranks, and how they are saved."""
