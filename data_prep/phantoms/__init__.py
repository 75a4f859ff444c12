"""Synthetic mammograms for the demo and the tests, as plain pairs or as a release.

They are written as any source of data would have them; this package must not know datasets.
"""
