"""Reads configuration and weight files of the reference implementation and its projects."""
