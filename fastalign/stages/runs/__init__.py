"""What a run keeps beside its model: its folder, checkpoints, metrics, ranks, and how it ends."""
