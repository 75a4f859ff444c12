"""Implements Adam, its schedule, the average of weights, and the loss scale of float16."""
