"""Segmentation metrics, of a batch and of a case."""
