"""Implements Adam, its schedule by epochs or time, the average of weights, and the loss scale."""
