"""Trains: step, loop, stored results."""
