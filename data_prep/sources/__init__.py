"""Finds pairs of image and mask in the layouts of source folders.

Reads names, and the annotations of an INbreast release; does not depend on how datasets are stored.
"""
