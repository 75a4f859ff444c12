"""Evaluates a trained network on a split: counts, measures and what is stored of them."""
