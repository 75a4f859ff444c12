"""The training step and the loop's parts."""
