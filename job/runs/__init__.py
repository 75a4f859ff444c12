"""The run protocol: lease, commits, checkpoints, what is stored."""
