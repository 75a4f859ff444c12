"""DICOM files -> pixels, their full scale and their spacing; nothing else of a file leaves here.

A picture that is not what this package reads is refused, and no value of an element is quoted.
"""
