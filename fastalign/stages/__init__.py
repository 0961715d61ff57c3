"""Training stages, one file each: a `run` of its configuration over the training loop of loop.py."""
