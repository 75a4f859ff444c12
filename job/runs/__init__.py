"""Stores runs: ownership, checkpoints, outcome, and the origin of the weights."""
