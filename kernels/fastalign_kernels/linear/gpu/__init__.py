"""The engines that run a head on a GPU, and what they ask of it."""
