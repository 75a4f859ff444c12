"""The dataset contract, and what writes it."""
