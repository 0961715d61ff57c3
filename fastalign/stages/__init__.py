"""Training stages: one file a stage, each a config dataclass and a `run` over the one loop in loop.py."""
