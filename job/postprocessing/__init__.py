"""Turns probabilities into masks, and fits how: thresholds, small regions, temperature."""
