"""Decodes images and masks, fits them to a size, and converts masks to class ids.

Pure functions on bytes and pixels; they do not depend on datasets, groups or storage.
"""
