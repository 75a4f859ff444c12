"""Compares the evaluations of runs on the same cases: paired differences, curves, options."""
