"""Augments training samples."""
