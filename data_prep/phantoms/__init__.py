"""Writes synthetic mammograms for the demo and the tests, as pairs or as an INbreast release.

The files have the form of any data source; the package does not depend on datasets.
"""
