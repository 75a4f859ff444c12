"""Ray Jobs: commands submitted to the head of a cluster."""
