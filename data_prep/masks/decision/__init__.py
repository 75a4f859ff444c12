"""Decides how the masks of a dataset are read: encoding, classes and ignored pixels."""
