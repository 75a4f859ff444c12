"""Synthetic mammograms for the demo and the tests."""
