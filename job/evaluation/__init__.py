"""Evaluates a trained network on a split: counts pixels, measures cases, writes tables."""
