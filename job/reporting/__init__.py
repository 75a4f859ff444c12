"""Curves and pages about a run."""
